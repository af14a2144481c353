"""setup.py: what it builds, and what it says where it can't. And the machine code of csrc/, which needs
nvcc and no GPU.

The first half plays nvcc with scripts of a few lines. The second reads what ``pip install -e .``
compiled, and compiles by itself only what is not up to date.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("csrc/*.cu"))
ATTENTION = ("forward_kernel", "dq_kernel", "dkdv_kernel")
REGISTERS = 65_536  # of a multiprocessor, and so of a block


pytest.importorskip("setuptools", reason="setuptools is not installed; setup.py needs it")


def load_setup():
    specification = importlib.util.spec_from_file_location("voco_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


builder = load_setup()


# ---- Where nvcc is, and what is said where it is not.

NVCC = """#!/bin/sh
here=${0%/*}
case "$1" in
    --version)
        echo "nvcc: NVIDIA (R) Cuda compiler driver"
        echo "Cuda compilation tools, release RELEASE, V0.0.0" ;;
    --dryrun)
        echo "#\\$ _NVVM_BRANCH_=nvvm" >&2
        echo "#\\$ TOP=$here/.." >&2
        echo "#\\$ INCLUDES=\\"-I$here/../include\\" " >&2
        echo "#\\$ LIBRARIES=  \\"-L$here/../lib/stubs\\" \\"-L$here/../lib\\"" >&2
        echo "#\\$ gcc -E /dev/null" >&2 ;;
    *) COMPILE ;;
esac
"""


def write_nvcc(folder: Path, release: str = "13.0", compile: str = "exit 9") -> Path:
    return write_script(
        folder / "nvcc", NVCC.replace("RELEASE", release).replace("COMPILE", compile)
    )


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Path:
    """A machine without a toolkit: no variables, PATH is ``bin``, the usual place is ``usual``."""
    for name in ("CUDA_HOME", "CUDA_PATH", "VOCO_BUILD_CUDA", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(builder, "USUAL_HOME", str(tmp_path / "usual"))
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path


@pytest.fixture
def modules(monkeypatch):
    """``modules()`` -> the names of the extension modules that setup.py asks setuptools for."""

    def run() -> list[str]:
        asked = {}
        monkeypatch.setattr(builder, "setup", asked.update)
        builder.main()
        return [module.name for module in asked["ext_modules"]]

    return run


def test_the_command_line_says_it_in_one_line():
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "VOCO_BUILD_CUDA": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("voco-kernels:")]
    assert said == ["voco-kernels: the CUDA extension is not built: VOCO_BUILD_CUDA is 0"]


def test_no_nvcc_no_extension(machine, modules, capsys):
    assert modules() == []
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "not built: found no nvcc in CUDA_HOME" in said


def test_with_nvcc_there_is_one_extension_and_nothing_to_say(machine, modules, capsys):
    write_nvcc(machine / "bin")
    assert modules() == ["voco_kernels._C"]
    assert capsys.readouterr().err == ""


def test_left_out_on_request(machine, modules, monkeypatch):
    write_nvcc(machine / "bin")
    monkeypatch.setenv("VOCO_BUILD_CUDA", "0")
    assert modules() == []


def test_demanded_and_impossible_is_an_error(machine, modules, monkeypatch):
    monkeypatch.setenv("VOCO_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="VOCO_BUILD_CUDA is 1, but .* found no nvcc"):
        modules()


@pytest.mark.parametrize("release, served", [("11.8", False), ("12.4", False), ("12.5", True)])
def test_an_old_nvcc_is_named(machine, modules, capsys, release, served):
    nvcc = write_nvcc(machine / "bin", release)
    assert modules() == ["voco_kernels._C"] * served
    expected = f"expected nvcc 12.5 or newer, got {release}: {nvcc}"
    assert (expected in capsys.readouterr().err) == (not served)


@pytest.mark.parametrize(
    "script, complaint",
    [
        ("#!/bin/sh\necho no license >&2\nexit 1\n", "--version failed: no license"),
        ("#!/bin/sh\necho hello\n", "expected 'release <major>.<minor>'"),
        ("#!/no/such/shell\n", "can't be run"),
    ],
)
def test_a_broken_nvcc_is_an_error(machine, modules, script, complaint):
    write_script(machine / "bin" / "nvcc", script)
    with pytest.raises(SystemExit, match=complaint):
        modules()


def test_where_nvcc_is_looked_for(machine, monkeypatch):
    assert builder.find_nvcc() is None
    usual = write_nvcc(machine / "usual" / "bin")
    assert builder.find_nvcc() == str(usual)
    on_path = write_nvcc(machine / "bin")
    assert builder.find_nvcc() == str(on_path)
    monkeypatch.setenv("CUDA_PATH", str(machine / "path"))
    assert builder.find_nvcc() == str(on_path)  # there is none in CUDA_PATH yet
    in_path = write_nvcc(machine / "path" / "bin")
    assert builder.find_nvcc() == str(in_path)
    monkeypatch.setenv("CUDA_HOME", str(machine / "home"))
    in_home = write_nvcc(machine / "home" / "bin")
    assert builder.find_nvcc() == str(in_home)


def test_the_toolkit_behind_a_wrapper(machine):
    nvcc = write_nvcc(machine / "cuda 13" / "bin")
    write_script(machine / "bin" / "nvcc", f'#!/bin/sh\nexec {shlex.quote(str(nvcc))} "$@"\n')
    includes, libraries = builder.toolkit(builder.find_nvcc())
    top = f"{nvcc.parent}/.."
    assert includes == [f"-I{top}/include"]
    assert libraries == [f"-L{top}/lib/stubs", f"-L{top}/lib"]


def test_a_dry_run_that_says_nothing_is_an_error(machine):
    nvcc = write_script(machine / "bin" / "nvcc", "#!/bin/sh\n")
    with pytest.raises(SystemExit, match="expected '#. INCLUDES='"):
        builder.toolkit(str(nvcc))


def test_what_pip_was_told_not_to_bring_is_named(machine, monkeypatch):
    write_nvcc(machine / "bin")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(SystemExit, match="no pybind11 and no ninja: pip install pybind11 ninja"):
        builder.build()


# ---- The build, with a compiler that writes down its calls.

COMPILE = """
        while [ $# -gt 0 ]; do
            case "$1" in -o) object=$2 ;; -MF) needs=$2 ;; -c) source=$2 ;; esac
            shift
        done
        echo "$source" >>calls
        echo "ptxas says something"
        grep -q broken "$source" && exit 1
        echo "$object: $source csrc/tiles.cuh" >"$needs"
        : >"$object" """


def need_tools() -> None:
    try:
        builder.find_tools()
    except SystemExit as lacking:
        pytest.skip(str(lacking))


@pytest.fixture
def compiled_now(machine, monkeypatch):
    """``compiled_now()`` builds a small project -> the sources that were compiled for it."""
    write_nvcc(machine / "bin", compile=COMPILE)
    monkeypatch.setenv("PATH", f"{machine / 'bin'}{os.pathsep}{os.defpath}")
    monkeypatch.setattr(builder, "ROOT", machine)
    need_tools()
    (machine / "csrc").mkdir()
    for name in ("forward.cu", "backward.cu", "tiles.cuh"):
        (machine / "csrc" / name).write_text("")

    def run() -> list[str]:
        calls = machine / "calls"
        calls.unlink(missing_ok=True)
        builder.build("kernels")
        return sorted(calls.read_text().split()) if calls.exists() else []

    return run


def test_only_what_changed_is_compiled_again(compiled_now, machine):
    both = ["csrc/backward.cu", "csrc/forward.cu"]
    assert compiled_now() == both
    assert compiled_now() == []
    (machine / "csrc" / "forward.cu").touch()
    assert compiled_now() == ["csrc/forward.cu"]
    (machine / "csrc" / "tiles.cuh").touch()
    assert compiled_now() == both
    (machine / builder.BUILD / "backward.cu.log").unlink()
    assert compiled_now() == ["csrc/backward.cu"]
    log = machine / builder.BUILD / "forward.cu.log"
    assert log.read_text() == "ptxas says something\n"


def test_a_kernel_that_does_not_compile_is_an_error(compiled_now, machine, capfd):
    (machine / "csrc" / "forward.cu").write_text("broken")
    with pytest.raises(SystemExit, match="building the CUDA extension failed"):
        compiled_now()
    said = capfd.readouterr().out
    assert "FAILED" in said and "ptxas says something" in said
    with pytest.raises(SystemExit, match="building the CUDA extension failed"):
        compiled_now()  # and stays one, though the log is there now


# ---- The machine code of csrc/.


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of a kernel: registers a thread; bytes of stack and spilled, a thread; bytes of
    static shared memory, a block."""

    name: str
    registers: int
    stack: int
    spilled: int
    shared: int


def read_log(log: str) -> list[Kernel]:
    kernels = []
    for entry in log.split("Compiling entry function ")[1:]:
        # a function that was not inlined has a line of its own
        memory = re.findall(
            r"(\d+) bytes stack.*?(\d+) bytes spill st.*?(\d+) bytes spill l", entry
        )
        stack, stores, loads = (sum(map(int, column)) for column in zip(*memory, strict=True))
        shared = re.search(r"(\d+) bytes smem", entry)
        kernels.append(
            Kernel(
                name=re.match(r"'(\w+)'", entry)[1],
                registers=int(re.search(r"Used (\d+) registers", entry)[1]),
                stack=stack,
                spilled=stores + loads,
                shared=int(shared[1]) if shared else 0,
            )
        )
    return kernels


def complaints(log: str) -> list[str]:
    """Warnings, and remarks with a number: ptxas serialised wgmma (C7510, C7512), added waits for it
    (C7517) or ignored a setmaxnreg (C7508)."""
    remark = re.compile(r"^ptxas (?:warning|error|.*\(C\d+\))|setmaxnreg|wgmma.*serialized", re.M)
    return [line for line in log.splitlines() if remark.search(line)]


LOG = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine
ptxas warning : Registers are spilled to local memory in function '_Z9dq_kernelv', 100 bytes
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z14forward_kernelI4BF16Li64EEv6Params' for 'sm_90a'
ptxas info    : Function properties for _Z14forward_kernelI4BF16Li64EEv6Params
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
ptxas info    : Compile time = 256.148 ms
ptxas info    : Compiling entry function '_Z9dq_kernelv' for 'sm_90a'
ptxas info    : Function properties for _Z9dq_kernelv
    96 bytes stack frame, 100 bytes spill stores, 124 bytes spill loads
ptxas info    : Function properties for _Z6helperv
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 90 registers, used 1 barriers, 96 bytes cumulative stack size, 256 bytes smem
"""


def test_the_log_is_read():
    """Of ptxas 13.0, so that the tests below can fail."""
    assert complaints(LOG) == LOG.splitlines()[:3]
    assert read_log(LOG) == [
        Kernel("_Z14forward_kernelI4BF16Li64EEv6Params", 168, stack=0, spilled=0, shared=0),
        Kernel("_Z9dq_kernelv", 90, stack=112, spilled=236, shared=256),
    ]


@pytest.fixture(scope="session")
def build_folder() -> Path:
    """Where every kernel's ``<name>.cu.o`` and ``<name>.cu.log`` are, up to date."""
    reason = builder.missing()
    if reason:
        pytest.skip(f"the CUDA extension can't be built: {reason}")
    need_tools()
    import fcntl  # on Linux, where alone there is an extension

    (ROOT / builder.BUILD).mkdir(parents=True, exist_ok=True)
    with (ROOT / builder.BUILD / "tests.lock").open("w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # pytest-xdist has more than one process here, ninja expects one
        return builder.build("kernels")


def kernels_of(source: Path, folder: Path) -> list[Kernel]:
    kernels = read_log((folder / f"{source.name}.log").read_text())
    assert kernels, f"{source.name} holds no kernel"
    return kernels


def disassemble(source: Path, folder: Path, what: str) -> str:
    """What Triton's cuobjdump says of an object: ``-sass`` its code, ``-elf`` its attributes too."""
    pytest.importorskip("triton", reason="Triton is not installed; its wheel has cuobjdump")
    where = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    tool = shutil.which("cuobjdump", path=str(where))
    if tool is None:
        pytest.skip(f"there is no cuobjdump in {where}")
    command = [tool, what, str(folder / f"{source.name}.o")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)


@each_source
@pytest.mark.timeout(900)
def test_registers_and_memory(source, build_folder):
    assert complaints((build_folder / f"{source.name}.log").read_text()) == []
    for kernel in kernels_of(source, build_folder):
        assert kernel.stack == 0 and kernel.spilled == 0, f"spills: {kernel}"
        # It would come on top of the dynamic, which the launch sizes as if there were no other.
        assert kernel.shared == 0, f"static shared memory: {kernel}"


@each_source
@pytest.mark.timeout(900)
def test_a_block_fits_a_multiprocessor(source, build_folder):
    sections = disassemble(source, build_folder, "-elf").split("\n.nv.info.")[1:]
    bounds = {}
    for section in sections:
        name, _, attributes = section.partition("\n")
        threads = re.search(r"EIATTR_MAX_THREADS\s.*\s.*Value:\s+(\w+) (\w+) (\w+)", attributes)
        if threads:
            bounds[name] = [int(extent, 16) for extent in threads.groups()]
    for kernel in kernels_of(source, build_folder):
        assert kernel.name in bounds, f"{kernel.name} has no __launch_bounds__"
        x, y, z = bounds[kernel.name]
        assert kernel.registers * x * y * z <= REGISTERS, (kernel, bounds[kernel.name])


@each_source
@pytest.mark.timeout(900)
def test_attention_is_by_wgmma_on_tiles_that_tma_loads(source, build_folder):
    opcodes = {}
    for function in disassemble(source, build_folder, "-sass").split("Function : ")[1:]:
        name, _, code = function.partition("\n")
        found = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code)
        opcodes[name] = Counter(found)
    for kernel in kernels_of(source, build_folder):
        if any(name in kernel.name for name in ATTENTION):
            assert opcodes[kernel.name]["HGMMA"], f"no warpgroup products: {kernel.name}"
            assert opcodes[kernel.name]["UTMALDG"], f"no TMA loads: {kernel.name}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kernel", ["forward_kernel", "dq_kernel"])
def test_the_softmax_runs_beside_the_product(kernel, build_folder):
    """Between the wait for the scores (all but one group) and the wait for the product behind them (all)
    stand a block's exponentials. ptxas likes to move the second wait in front of them."""
    (source,) = (s for s in SOURCES if s.stem.endswith(f"{kernel.removesuffix('_kernel')}_sm90"))
    found = 0
    for function in disassemble(source, build_folder, "-sass").split("Function : ")[1:]:
        name, _, code = function.partition("\n")
        if kernel not in name or (kernel == "dq_kernel" and "Li256E" in name):  # no room to overlap
            continue
        found += 1
        steps = re.findall(r"(MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x[01])", code)
        waits = [i for i, step in enumerate(steps) if step.endswith("0x1")]
        assert waits, f"nothing overlaps: {name}"
        for i in waits:
            beside = next(n for n, later in enumerate(steps[i + 1 :]) if "DEPBAR" in later)
            assert beside >= 32, f"{beside} exponentials beside the product: {name}"
    assert found >= 4


@pytest.mark.timeout(900)
def test_keys_and_values_move_by_16_bytes(build_folder):
    """Where they are only copied, four loads are under way before one is waited for."""
    (source,) = (source for source in SOURCES if source.stem == "kv_load")
    found = Counter()
    for function in disassemble(source, build_folder, "-sass").split("Function : ")[1:]:
        name, _, code = function.partition("\n")
        found[re.search("kv_(copy|convert)_kernel", name)[1]] += 1
        steps = re.findall(r"\b(LDG|STG)\.E\S*\.128\b", code)
        assert "LDG" in steps and "STG" in steps, name
        if "kv_copy" in name:
            assert steps[: steps.index("STG")].count("LDG") >= 4, f"{steps}: {name}"
    assert found == {"copy": 2, "convert": 1}


@pytest.mark.timeout(900)
def test_no_attention_kernel_is_called_otherwise(build_folder):
    """The test above finds them by name."""
    names = [kernel.name for source in SOURCES for kernel in kernels_of(source, build_folder)]
    assert [part for part in ATTENTION if not any(part in name for name in names)] == []
