"""The compiler, the instruction sets and the cache of built kernels."""

import hashlib
import json
import subprocess
import sys

import pytest

from sparsify import runtime
from sparsify.codegen import target
from sparsify.errors import BuildError, InputError, Refusal
from sparsify.runtime import store, toolchain

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """The machine's compiler behind a script that counts its builds, and an empty cache."""
    found = runtime.find_compiler()
    if not found:
        pytest.skip(str(found))
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "cache"))
    return fake(tmp_path, f'echo built >> {tmp_path}/builds\n{found.command[0]} "$@"')


def fake(folder, script):
    """A compiler made of a shell script."""
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return runtime.Compiler((str(path),), "fake 1.0")


def load(compiler, source=SOURCE, flags=()):
    """Loads as a new process would: nothing remembered."""
    store._load.cache_clear()
    return runtime.load_library("answer", source, flags, compiler)


def builds(tmp_path):
    return len((tmp_path / "builds").read_text().splitlines())


def entry(tmp_path, ending):
    (found,) = (tmp_path / "cache").glob(f"answer-*{ending}")
    return found


def test_built_once_and_kept_with_its_source(compiler, tmp_path):
    assert load(compiler).answer() == 42
    assert load(compiler).answer() == 42
    assert builds(tmp_path) == 1
    assert entry(tmp_path, ".cpp").read_text() == SOURCE
    assert json.loads(entry(tmp_path, ".json").read_text())["compiler"] == "fake 1.0"
    assert not list((tmp_path / "cache").glob(".build-*"))


def test_source_flags_and_compiler_name_the_entry(compiler, tmp_path):
    load(compiler)
    assert load(compiler, SOURCE.replace("42", "43")).answer() == 43
    load(compiler, flags=("-DX",))
    load(runtime.Compiler(compiler.command, "fake 1.1"))
    assert builds(tmp_path) == 4


def truncate(tmp_path):
    library = entry(tmp_path, ".so")
    library.write_bytes(library.read_bytes()[:1000])


def flip_a_bit(tmp_path):
    library = entry(tmp_path, ".so")
    found = bytearray(library.read_bytes())
    found[len(found) // 2] ^= 1
    library.write_bytes(found)


def not_a_library(tmp_path):
    entry(tmp_path, ".so").write_bytes(b"nonsense")
    entry(tmp_path, ".json").write_text(json.dumps({"sha256": hashlib.sha256(b"nonsense").hexdigest()}))


def lose_the_record(tmp_path):
    entry(tmp_path, ".json").unlink()


def empty_the_record(tmp_path):
    entry(tmp_path, ".json").write_text("[")


def in_a_process(compiler):
    """Loads in a process of its own: this one would be given a library that it has loaded before by its name."""
    script = (
        "from sparsify import runtime\n"
        f"compiler = runtime.Compiler({compiler.command!r}, 'fake 1.0')\n"
        f"assert runtime.load_library('answer', {SOURCE!r}, (), compiler).answer() == 42"
    )
    return subprocess.Popen([sys.executable, "-c", script])


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, not_a_library, lose_the_record, empty_the_record])
def test_a_bad_entry_is_built_again(compiler, tmp_path, harm):
    assert in_a_process(compiler).wait(timeout=100) == 0
    harm(tmp_path)
    assert load(compiler).answer() == 42
    assert builds(tmp_path) == 2


def test_processes_that_need_one_kernel_build_it_once(compiler, tmp_path):
    running = [in_a_process(compiler) for _ in range(4)]
    assert [process.wait(timeout=100) for process in running] == [0] * 4
    assert builds(tmp_path) == 1


def test_a_failing_compiler_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "cache"))
    lines = "; ".join(f"echo line {i} >&2" for i in range(40))
    with pytest.raises(BuildError) as error:
        load(fake(tmp_path, f"{lines}; exit 3"), flags=("-DTHIS",))
    said = str(error.value).splitlines()
    assert said[0].startswith("kernel answer-") and said[0].endswith("the compiler failed with status 3")
    assert str(tmp_path / "cxx") in said[1] and "-DTHIS" in said[1]
    assert said[2:] == [f"  line {i}" for i in range(store.SHOWN_LINES)]
    assert entry(tmp_path, ".cpp").read_text() == SOURCE  # kept, for whoever asks why


def test_a_cache_that_cannot_be_written_says_so(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match=r"can't be written: Not a directory \(set SPARSIFY_CACHE_DIR to a folder"):
        load(compiler)


def test_no_compiler_is_a_refusal(tmp_path, monkeypatch):
    for name in ("SPARSIFY_CXX", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = target("cpp").unavailable()
    assert isinstance(found, Refusal)
    assert str(found) == (
        "no C++ compiler was found (looked for c++, g++, clang++) (install g++ or clang++, or set SPARSIFY_CXX)"
    )
    monkeypatch.setenv("SPARSIFY_CXX", "nonesuch -m64")
    assert "the C++ compiler 'nonesuch' was not found" in str(target("cpp").unavailable())


def test_a_compiler_that_does_not_run_is_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_CXX", fake(tmp_path, "exit 1").command[0])
    assert "can't be run" in str(target("cpp").unavailable())


def test_a_named_compiler_may_have_arguments(tmp_path, monkeypatch):
    path = fake(tmp_path, "echo fake 2.0").command[0]
    monkeypatch.setenv("SPARSIFY_CXX", f"{path} -m64")
    assert runtime.find_compiler() == runtime.Compiler((path, "-m64"), "fake 2.0")


def test_the_best_instruction_set_is_taken_and_another_can_be_forced(monkeypatch):
    monkeypatch.delenv("SPARSIFY_ISA", raising=False)
    features = frozenset({"avx2", "fma"})
    monkeypatch.setattr(toolchain, "cpu_features", lambda: features)
    assert runtime.machine_isa().name == "avx2"
    monkeypatch.setenv("SPARSIFY_ISA", "portable")
    assert runtime.machine_isa().name == "portable"
    monkeypatch.setenv("SPARSIFY_ISA", "avx512")
    with pytest.raises(InputError) as error:
        runtime.machine_isa()
    assert str(error.value) == (
        "environment variable SPARSIFY_ISA: this machine can't run 'avx512'"
        " (no avx512bw, avx512dq, avx512f, avx512vl); it runs avx2, portable"
    )


def test_avx512_without_bf16_products(monkeypatch):
    monkeypatch.delenv("SPARSIFY_ISA", raising=False)
    monkeypatch.setattr(toolchain, "cpu_features", lambda: toolchain.ISAS["avx512"].needs)
    assert runtime.machine_isa() == toolchain.ISAS["avx512"] and not runtime.machine_isa().bf16_dot


def test_threads_come_from_the_pool_that_torch_loaded():
    """Two OpenMP libraries in one process would compete for the cores."""
    import torch

    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this torch has no OpenMP")
    before = set(runtime.threads._openmp_libraries())
    assert runtime.parallel_function() != 0
    assert set(runtime.threads._openmp_libraries()) == before
