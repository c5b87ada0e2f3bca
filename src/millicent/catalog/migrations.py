"""The ledger's tables, as numbered steps that each ledger takes once. SQLite and PostgreSQL read the same text.

runs: one row a process that drew. elapsed_s counts from the moment its weights were loaded; loading_s came before.
    busy_until_s: when its last attempt ended. lease_until: on the database's clock, until when its images are its own, where
    several may write.
images: one row an output. asked: digest of what can be known of an image without reading its pictures, so that a row that is
    done is passed over at once. key: hash of the pictures' bytes, the settings and the weights. seconds, usd: of all its attempts.
    rejects_forgiven: of its rejects, those before somebody asked to try once more. set_aside: where the picture that was rejected
    last is kept, under the output root.
attempts: one row a drawing that was begun, and so paid.

Dollars are text, as a binary fraction has no place in money. BIGINT and DOUBLE PRECISION are what SQLite takes as integer and real.
"""

from __future__ import annotations

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE runs (
            id TEXT PRIMARY KEY,
            host TEXT NOT NULL,
            pid BIGINT NOT NULL,
            started_at TEXT NOT NULL,
            loading_s DOUBLE PRECISION NOT NULL,
            elapsed_s DOUBLE PRECISION NOT NULL,
            busy_until_s DOUBLE PRECISION NOT NULL,
            cards BIGINT NOT NULL,
            usd_per_hour TEXT,
            lease_until DOUBLE PRECISION NOT NULL,
            ended_at TEXT,
            stopped TEXT NOT NULL DEFAULT ''
        )""",
        """CREATE TABLE images (
            output TEXT PRIMARY KEY,
            row_line BIGINT NOT NULL,
            row_id TEXT NOT NULL,
            variant TEXT NOT NULL,
            pictures TEXT NOT NULL,
            prompt TEXT NOT NULL,
            asked TEXT NOT NULL,
            key TEXT,
            state TEXT NOT NULL,
            run_id TEXT NOT NULL,
            attempts BIGINT NOT NULL DEFAULT 0,
            failures BIGINT NOT NULL DEFAULT 0,
            rejects BIGINT NOT NULL DEFAULT 0,
            rejects_forgiven BIGINT NOT NULL DEFAULT 0,
            seed BIGINT,
            seconds DOUBLE PRECISION NOT NULL DEFAULT 0,
            usd TEXT,
            linked_to TEXT,
            sha256 TEXT,
            why TEXT NOT NULL DEFAULT ''
        )""",
        """CREATE TABLE attempts (
            output TEXT NOT NULL,
            number BIGINT NOT NULL,
            run_id TEXT NOT NULL,
            seed BIGINT NOT NULL,
            state TEXT NOT NULL,
            started_s DOUBLE PRECISION NOT NULL,
            prepare_s DOUBLE PRECISION,
            encode_s DOUBLE PRECISION,
            denoise_s DOUBLE PRECISION,
            decode_s DOUBLE PRECISION,
            check_s DOUBLE PRECISION,
            write_s DOUBLE PRECISION,
            seconds DOUBLE PRECISION NOT NULL DEFAULT 0,
            usd TEXT,
            why TEXT NOT NULL DEFAULT '',
            PRIMARY KEY (output, number)
        )""",
        "CREATE INDEX images_by_key ON images (key)",
        "CREATE INDEX images_in_order ON images (row_line, output)",
        "CREATE INDEX attempts_running ON attempts (run_id) WHERE state = 'running'",
        "CREATE INDEX attempts_by_run ON attempts (run_id, state)",
    ),
    ("ALTER TABLE images ADD COLUMN set_aside TEXT",),
)
