"""Build of the CUDA extension ``voco_kernels/_C.<abi>.so`` from csrc/.

The extension takes raw pointers and links the CUDA runtime statically, so building it needs nvcc, g++,
pybind11 and ninja, but no libtorch, driver or GPU. If nvcc is missing or too old, the package is
installed without the extension, and a line on stderr says why. A build that fails is an error.

``VOCO_BUILD_CUDA=0`` leaves the extension out; with ``VOCO_BUILD_CUDA=1``, installing without it is an
error.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Relative to ROOT, where ninja runs. setuptools' own build folder isn't used because pip makes a new one
# each time, and every kernel would be recompiled.
BUILD = Path("build") / f"cuda-{sys.implementation.cache_tag}"
USUAL_HOME = "/usr/local/cuda"
# Older versions have sm_90a, but not cudaGetDriverEntryPointByVersion, which csrc/runtime.cuh calls.
OLDEST_NVCC = (12, 5)
# Peak memory of ptxas for these kernels, with some margin: small machines compile one at a time.
BYTES_PER_NVCC = 4 << 30

# The logs are kept for the tests, which check registers, spills and ptxas's warnings.
# Only bindings.cpp depends on pybind11, whose folder differs in each isolated build by pip.
RULES = """
rule nvcc
  command = $nvcc -gencode=arch=compute_90a,code=sm_90a -O3 -std=c++17 -lineinfo $
      -Xptxas -v,-warn-spills -Xcompiler -fPIC,-fvisibility=hidden $
      -MD -MF $out.d -c $in -o $out >$log 2>&1; status=$$?; cat $log; exit $$status
  depfile = $out.d
  description = nvcc $in
  pool = nvcc

rule cxx
  command = $cxx -O3 -std=c++17 -fPIC -fvisibility=hidden -DVOCO_MODULE_NAME=_C $includes $
      -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  description = c++ $in

rule link
  command = $cxx -shared $in -o $out $libraries -lcudart_static -ldl -lpthread -lrt $
      -Wl,--exclude-libs,ALL
  description = link $out

build $builddir/bindings.cpp.o: cxx csrc/bindings.cpp
"""


def fail(message: str) -> NoReturn:
    raise SystemExit(f"voco-kernels: {message}")


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes if home]
    found += [shutil.which("nvcc"), shutil.which("nvcc", path=os.path.join(USUAL_HOME, "bin"))]
    return next(filter(None, found), None)


def ask(nvcc: str, *arguments: str) -> str:
    """Run nvcc and return its output, stdout and stderr. Exit with an error if it fails."""
    try:
        answer = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    except OSError as error:
        fail(f"{nvcc} can't be run: {error}")
    if answer.returncode:
        fail(f"{nvcc} {shlex.join(arguments)} failed: {answer.stderr.strip()}")
    return answer.stdout + answer.stderr


def version(nvcc: str) -> tuple[int, int]:
    answer = ask(nvcc, "--version")
    found = re.search(r"release (\d+)\.(\d+)", answer)
    if not found:
        fail(f"expected 'release <major>.<minor>' from {nvcc} --version, got {answer!r}")
    return int(found[1]), int(found[2])


def missing() -> str | None:
    """The reason why the extension is not built; None if it can be built."""
    wanted = os.environ.get("VOCO_BUILD_CUDA") or None
    if wanted not in (None, "0", "1"):
        fail(
            f"expected VOCO_BUILD_CUDA to be 0 or 1, got {wanted!r}; unset it to build if nvcc is found"
        )
    if wanted == "0":
        return "VOCO_BUILD_CUDA is 0"
    if sys.platform != "linux":
        return f"expected Linux, got {sys.platform}"
    nvcc = find_nvcc()
    if nvcc is None:
        return f"found no nvcc in CUDA_HOME, in CUDA_PATH, on the PATH or in {USUAL_HOME}"
    if (found := version(nvcc)) < OLDEST_NVCC:
        return "expected nvcc {}.{} or newer, got {}.{}: {}".format(*OLDEST_NVCC, *found, nvcc)
    return None


def toolkit(nvcc: str) -> tuple[list[str], list[str]]:
    """The toolkit's ``-I`` and ``-L`` arguments for g++, as reported by nvcc. They can't be derived from
    nvcc's path, which may be a wrapper script, and toolkits from Conda and PyPI have other folders."""
    answer = ask(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)
    said = dict(re.findall(r"^#\$ (\w+)=(.*)$", answer, re.M))
    if not {"INCLUDES", "LIBRARIES"} <= set(said):
        fail(f"expected '#$ INCLUDES=' and '#$ LIBRARIES=' from {nvcc} --dryrun, got {answer!r}")
    return shlex.split(said["INCLUDES"]), shlex.split(said["LIBRARIES"])


def find_tools() -> tuple[str, str]:
    """The path of ninja, and pybind11's include folder. Exit with an error if either is missing: pip
    installs both unless build isolation is off."""
    try:
        from pybind11 import get_include
    except ImportError:
        get_include = None
    try:
        # not on the PATH unless the environment is activated
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    ninja = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    lacking = ["pybind11"] * (get_include is None) + ["ninja"] * (ninja is None)
    if lacking:
        fail(
            f"found nvcc, but no {' and no '.join(lacking)}: pip install {' '.join(lacking)}, or leave "
            "out --no-build-isolation, or set VOCO_BUILD_CUDA=0 to install without the CUDA extension"
        )
    return ninja, get_include()


def jobs() -> int:
    """How many nvcc processes may run at once, limited by cores and memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_NVCC))


def ninja_file(nvcc: str, pybind11_include: str) -> str:
    includes, libraries = toolkit(nvcc)
    includes += [f"-I{pybind11_include}", f"-I{sysconfig.get_path('include')}"]
    values = {
        "nvcc": [nvcc],
        "cxx": shlex.split(os.environ.get("CXX", "g++")),
        "includes": includes,
        "libraries": libraries,
    }
    lines = [f"builddir = {BUILD}"]
    # $ starts a variable in ninja's files
    lines += [f"{name} = {shlex.join(value).replace('$', '$$')}" for name, value in values.items()]
    lines += [f"pool nvcc\n  depth = {jobs()}", RULES]
    objects = []
    for source in sorted(ROOT.glob("csrc/*.cu")):
        name = f"$builddir/{source.name}"
        lines.append(f"build {name}.o | {name}.log: nvcc csrc/{source.name}\n  log = {name}.log")
        objects.append(f"{name}.o")
    lines.append(f"build kernels: phony {' '.join(objects)}")
    lines.append(f"build $builddir/_C.so: link {' '.join(objects)} $builddir/bindings.cpp.o")
    return "\n".join(lines) + "\n"


def build(target: str = f"{BUILD}/_C.so") -> Path:
    """Build ``target`` (``"kernels"``: only the .cu.o and .cu.log files) and return the build folder."""
    ninja, pybind11_include = find_tools()
    folder = ROOT / BUILD
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(find_nvcc(), pybind11_include))
    if subprocess.run([ninja, "-f", f"{BUILD}/build.ninja", target], cwd=ROOT).returncode:
        fail("building the CUDA extension failed; see the compiler's output above")
    return folder


class BuildWithNinja(build_ext):
    def build_extension(self, ext: Extension) -> None:
        extension = Path(self.get_ext_fullpath(ext.name))
        extension.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build() / "_C.so", extension)


def main() -> None:
    reason = missing()
    if reason and os.environ.get("VOCO_BUILD_CUDA") == "1":
        fail(f"VOCO_BUILD_CUDA is 1, but the CUDA extension can't be built: {reason}")
    if reason:
        print(f"voco-kernels: the CUDA extension is not built: {reason}", file=sys.stderr)
    setup(
        ext_modules=[] if reason else [Extension("voco_kernels._C", [])],
        cmdclass={"build_ext": BuildWithNinja},
    )


if __name__ == "__main__":
    main()
