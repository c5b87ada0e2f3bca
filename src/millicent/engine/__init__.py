"""From words to a picture: the schedule, the stages of an edit, and the editor that runs them."""
