"""Host memory as a container has it, from files laid out as the kernel does in both versions of control groups."""

from pathlib import Path

from millicent.hardware.memory import read_memory

GIB = 1 << 30
MEMINFO = f"MemTotal:  {500 * GIB // 1024} kB\nMemFree:  {10 * GIB // 1024} kB\nMemAvailable:  {400 * GIB // 1024} kB\n"


# of the group itself, and with those below it
STAT_OF_V1 = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {GIB // 4}\ntotal_active_file {GIB // 4 * 3}\n"


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(folder: str, limit: str, current: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{current}\n",
        f"{folder}/memory.stat": f"anon 1\nshmem 9\nactive_anon 9\ninactive_file {inactive}\nactive_file {active}\n",
    }


def test_a_host_without_limits_has_what_is_available(tmp_path: Path) -> None:
    memory = read_memory(lay(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/user.slice\n"}))
    assert (memory.total_bytes, memory.limit_bytes, memory.available_bytes) == (500 * GIB, None, 400 * GIB)


def test_a_container_has_its_limit_and_cache_counts_as_free(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"} | v2("sys/fs/cgroup", str(8 * GIB), 6 * GIB, 2 * GIB, GIB)
    memory = read_memory(lay(tmp_path, files))
    assert (memory.limit_bytes, memory.available_bytes) == (8 * GIB, 5 * GIB)


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/pod/box\n"}
    files |= v2("sys/fs/cgroup/pod", str(4 * GIB), GIB) | v2("sys/fs/cgroup/pod/box", "max", GIB)
    memory = read_memory(lay(tmp_path, files))
    assert (memory.limit_bytes, memory.available_bytes) == (4 * GIB, 3 * GIB)


def test_a_group_above_its_limit_has_nothing_left(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"} | v2("sys/fs/cgroup", str(GIB), 2 * GIB)
    assert read_memory(lay(tmp_path, files)).available_bytes == 0


def test_version_1_writes_a_huge_number_for_no_limit(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory"
    files = {
        "proc/meminfo": MEMINFO,
        # the path is the host's, which the container does not see
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/abc\n",
        f"{folder}/memory.limit_in_bytes": "9223372036854771712\n",
        f"{folder}/memory.usage_in_bytes": f"{GIB}\n",
    }
    assert read_memory(lay(tmp_path, files)).limit_bytes is None
    files |= {f"{folder}/memory.limit_in_bytes": f"{8 * GIB}\n", f"{folder}/memory.stat": STAT_OF_V1}
    memory = read_memory(lay(tmp_path, files))
    assert (memory.limit_bytes, memory.available_bytes) == (8 * GIB, 8 * GIB)


def test_a_limit_above_the_host_is_none(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"} | v2("sys/fs/cgroup", str(900 * GIB), GIB)
    memory = read_memory(lay(tmp_path, files))
    assert (memory.limit_bytes, memory.available_bytes) == (None, 400 * GIB)


def test_an_old_kernel_and_none_at_all(tmp_path: Path) -> None:
    assert read_memory(tmp_path).total_bytes == 0
    lay(tmp_path, {"proc/meminfo": f"MemTotal: {2 * GIB // 1024} kB\nMemFree: {GIB // 1024} kB\n"})
    assert read_memory(tmp_path).available_bytes == GIB
