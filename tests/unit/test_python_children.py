"""Tests that Python children import nothing from the current directory.

Each child starts in a directory with planted modules.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pageferry
from tests.kernel.images import Maker

PACKAGE = Path(pageferry.__file__).parent
PLANTED = ("msgspec", "pageferry", "qemu", "rich", "sitecustomize", "usercustomize", "logging", "asyncio")
PLANT = """
import os
with open(os.environ["PLANTED_RAN"], "a") as ran:
    ran.write(__name__ + " ")
raise ImportError(__name__)
"""
OTHER_PROGRAMS = {
    "fleet/operation_process.py",
    "host/qemus.py",
    "stores/keys.py",
    "workloads/qemu/libvirt.py",
    "workloads/qemu/process.py",
}
"""Modules that start only QEMU, virsh, the key command of the user, or a command that `python_command` has returned."""

CHILDREN = {
    "pageferry.fleet.operation_process": """
        import time
        from pathlib import Path
        from pageferry.fleet.operations import Operations, Order, now
        from pageferry.host.registry import Registry
        hostile()
        operations = Operations(Registry(Path(os.environ["SWITCHES"]) / "run"))
        operations.start(Order(id="one", kind="run", workload="one", command=["--version"], started=now()))
        while operations.report("one").state == "running":
            time.sleep(0.05)
        assert operations.report("one").exit_code == 0
    """,
    "pageferry.fleet.cluster_probe": """
        from pageferry.errors import FleetError
        from pageferry.fleet import cluster
        hostile()
        try:
            cluster._accepts_without_token("not an address")
        except FleetError as error:
            assert "whether the cluster" in str(error)
    """,
    "pageferry.pager.process": """
        import asyncio
        from pageferry.pager.launcher import PagerProcess
        hostile()
        pager = PagerProcess()
        opened = asyncio.run(pager.open(os.environ["IMAGE"], "planted"))
        assert opened.pages == 16
        pager.give_up()
    """,
    "pageferry.pager.serve_process": """
        from pathlib import Path
        from pageferry.errors import UsageError
        from pageferry.pager.firecracker.options import ServeOptions
        from pageferry.pager.serve_process import start_detached
        image = Path(os.environ["IMAGE"])
        hostile()
        try:
            start_detached("firecracker", image, image.with_name("socket"), ServeOptions())
        except UsageError as refused:
            assert "an image of made" in str(refused), refused
    """,
    "pageferry.stores.provider_process": """
        import asyncio
        import pageferry
        from pathlib import Path
        from pageferry.checkpoints.image_source import open_cache
        from pageferry.stores.address import image_url
        from pageferry.stores.lazy_image import open_image_file
        image = Path(os.environ["IMAGE"]).with_name("saved")
        arena = pageferry.Arena("1MiB")
        memoryview(arena)[0] = 7
        pageferry.checkpoint(arena, image)
        url = f"file://{image.parent}/store/image"
        os.environ["PAGEFERRY_CACHE_DIR"] = str(image.parent / "cache")
        pageferry.push_image(image, url)
        entry = asyncio.run(open_cache().obtain(image_url("url", url)))
        hostile()
        opened = open_image_file(entry.path, in_own_process=True, whole=True)
        assert opened.verify() == []
    """,
    "pageferry.demo.child": """
        from pageferry import _engine
        from pageferry.demo.shares import ChildShare
        import os
        file = os.memfd_create("shares")
        os.truncate(file, 1 << 21)
        mapping = _engine.Mapping(file, 1 << 21)
        hostile()
        share = ChildShare(mapping)
        share.stop()
    """,
    "pageferry.host.guardian_process": """
        from pathlib import Path
        from pageferry.sharing import ksm
        ksm.FOLDER = Path(os.environ["SWITCHES"])
        (ksm.FOLDER / "run").write_text("0")
        hostile()
        with ksm._running():
            assert (ksm.FOLDER / "run").read_text() == "1"
        assert (ksm.FOLDER / "run").read_text() == "0"
    """,
    "pageferry.demo.process": """
        import asyncio
        from pageferry.demo.run import _process, _expect
        setup = '{"name": "planted", "size": 4194304}'
        hostile()
        async def ready():
            async with _process("pageferry.demo.process", setup) as process:
                await _expect(process, "ready")
        asyncio.run(ready())
    """,
    "pageferry": """
        import asyncio
        from pageferry.demo.run import _process, _expect
        hostile()
        async def listening():
            words = ("receive", "planted", "--workload", "demo", "--output", "json")
            async with _process("pageferry", *words) as process:
                await _expect(process, "listening")
        asyncio.run(listening())
    """,
}
"""Programs that start a child, by the module of the child. `hostile()` exposes the child to planted modules."""

HOSTILE = """
import os
def hostile():
    os.chdir(os.environ["HOSTILE"])
    os.environ["PYTHONPATH"] = os.environ["HOSTILE"]
    os.environ["PYTHONSTARTUP"] = os.environ["HOSTILE"] + "/msgspec.py"
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Return a directory with planted modules and packages."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in PLANTED:
        (folder / f"{name}.py").write_text(PLANT)
    (folder / "pageferry.py").unlink()
    (folder / "pageferry").mkdir()
    (folder / "pageferry" / "__init__.py").write_text(PLANT)
    return folder


@pytest.mark.parametrize("module", CHILDREN)
def test_child_in_hostile_folder_imports_nothing_planted(module: str, hostile: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    switches = tmp_path / "switches"
    switches.mkdir()
    program = HOSTILE + "\n" + "\n".join(line.removeprefix("        ") for line in CHILDREN[module].splitlines())
    places = {"HOSTILE": str(hostile), "PLANTED_RAN": str(ran), "SWITCHES": str(switches)}
    places["IMAGE"] = str(Maker(16).write(tmp_path / "image"))
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], env=os.environ | places, capture_output=True, text=True, timeout=60
    )
    assert not ran.exists(), f"planted code ran: {ran.read_text()}"
    assert done.returncode == 0, done.stderr


def test_module_command_in_hostile_folder_imports_nothing_planted(hostile: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (hostile / "pageferry" / "__init__.py").unlink()
    (hostile / "pageferry").rmdir()
    subprocess.run(
        [sys.executable, "-m", "pageferry", "list"],
        cwd=hostile,
        env=os.environ | {"PLANTED_RAN": str(ran)},
        check=True,
        timeout=60,
    )
    assert not ran.exists()


def test_child_imports_packages_of_this_process_from_other_paths(tmp_path: Path) -> None:
    """The package is outside the child's site-packages, as with PYTHONPATH or user site-packages."""
    root = tmp_path / "elsewhere"
    root.mkdir()
    (root / "pageferry").symlink_to(PACKAGE)
    (root / "enum.py").write_text(PLANT)  # the child must not import it instead of the module of the standard library
    program = (
        f"import sys; sys.path.append({str(root)!r})\n"
        "import msgspec, pageferry, subprocess\n"
        f"pageferry.__file__ = {str(root / 'pageferry' / '__init__.py')!r}\n"
        "from pageferry.host.python import start_python\n"
        "child = start_python('pageferry', '--version', stdout=subprocess.PIPE)\n"
        "print(child.communicate()[0].decode())\n"
    )
    places = {"PLANTED_RAN": str(tmp_path / "ran")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], env=os.environ | places, capture_output=True, text=True
    )
    assert done.stdout.startswith("pageferry "), done.stderr
    assert not (tmp_path / "ran").exists()


def test_every_python_child_is_started_by_one_function() -> None:
    started: set[str] = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("executable", "_base_executable", "orig_argv"):
                assert name == "host/python.py", f"{name}:{node.lineno} starts Python directly"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "start_python" and isinstance(node.args[0], ast.Constant):
                    started.add(str(node.args[0].value))
                if _starts_a_program(called):
                    assert name in OTHER_PROGRAMS | {"host/python.py"}, f"{name}:{node.lineno}: {called}"
    assert started | {"pageferry", "pageferry.demo.process"} == set(CHILDREN)


def _starts_a_program(called: str) -> bool:
    last = called.split(".")[-1].split("[")[0]
    return (
        "subprocess." in called
        or last in ("Popen", "Outliving", "execv", "execve", "execvp", "posix_spawn", "posix_spawnp", "system", "popen")
        or "create_subprocess" in last
        or "multiprocessing" in called
        or last == "ProcessPoolExecutor"
    )
