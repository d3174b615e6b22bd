"""Compiles a kernel for real cards where there is none: as a script, given Python code that calls public functions.

Every launch that the code makes is compiled for every architecture, for the very types, alignments and constants of
its arguments. What comes out is a cubin: the assembler of each architecture has accepted it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ALL = (75, 80, 90, 120)  # RTX 20xx and T4, A100 (86 and 89 run its code's like), H100, RTX 50xx
ARCHITECTURES = ALL if os.environ.get("LOWVRAM_ALL_ARCHITECTURES") else (75, 90)  # see test_architectures.py
_NAMES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "uint8": "u8",
    "int8": "i8",
    "int32": "i32",
    "int64": "i64",
    "bool": "i1",
}


def compile_all(code: str, architectures: Sequence[int] = ARCHITECTURES) -> list[dict[str, Any]]:
    """Run `code` in a process of its own, compiling its launches; torch is imported there.

    Returns a record for each launch and architecture, without repeats: kernel, architecture, shared (bytes), spills and
    registers where the compiler tells them, loads and stores (instructions of global memory in the PTX, by width in
    bits).
    """
    folder = Path(__file__).parents[1]
    command = [sys.executable, __file__, json.dumps(list(architectures)), code]
    environment = _without_interpreter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _without_interpreter() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def _signature(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    import torch

    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    aligned: dict[tuple[int], Any] = {}
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | {
        k: v for k, v in options.items() if k in kernel.arg_names
    }
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    any_value = {p.name for p in kernel.params if p.do_not_specialize}
    for index, name in enumerate(kernel.arg_names):
        value = given[name]
        one = type(value) is int and value == 1 and name not in any_value
        if name in constexprs or value is None or one:
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _NAMES[str(value.dtype).removeprefix("torch.")]
            if value.data_ptr() % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in any_value:
                aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    rest = {k: v for k, v in options.items() if k not in kernel.arg_names}
    return signature, constants, aligned, rest


def _main(architectures: Sequence[int], code: str) -> None:
    import re
    from collections import Counter

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lowvram.kernels import dispatch

    results: list[dict[str, Any]] = []
    seen = set()

    def take(kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        signature, constants, aligned, rest = _signature(kernel, arguments, options)
        for architecture in architectures:
            key = (kernel.__name__, architecture, str(signature), str(constants), str(aligned), str(rest))
            if key in seen:
                continue
            seen.add(key)
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
            built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=rest)
            accesses: dict[str, Counter[int]] = {"loads": Counter(), "stores": Counter()}
            found = re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bf](\d+)", built.asm["ptx"])
            for kind, count, bits in found:
                accesses["loads" if kind == "ld" else "stores"][int(count or 1) * int(bits)] += 1
            results.append(
                {
                    "kernel": kernel.__name__,
                    "architecture": architecture,
                    "shared": built.metadata.shared,
                    "cubin_bytes": len(built.asm["cubin"]),
                    "signature": signature,
                    **{name: dict(counter) for name, counter in accesses.items()},
                }
            )

    with dispatch.launches_go_to(take):
        exec(compile(code, "<code>", "exec"), {"torch": torch, "dispatch": dispatch})
    print(json.dumps(results))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]), sys.argv[2])
