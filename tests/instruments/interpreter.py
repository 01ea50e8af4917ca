"""Takes two costs out of Triton's interpreter that change nothing of what it computes, and a fault out of that of 3.6.

Tests of kernels spend most of their time in the interpreter, and with these a third of that is left:

- each call of a function within a kernel searches the whole of ``triton.language`` for what it must replace, which the
  launch has done before;
- each integer sum and product is computed again in int64 to see whether it overflowed, and what is seen is thrown away,
  since only ``debug=True`` would make an error of it.

Both are in Triton 3.6 to 3.9. The minimum or maximum of a number and NaN is the number, as on a GPU; 3.6 returns NaN.
"""

import dataclasses
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Makes every kernel that this process interprets run without these costs and this fault."""
    builder = interpreter.InterpreterBuilder
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)

    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    replaced: set[frozenset[str]] = set()  # during this launch: the names of the modules whose functions were

    def launch_afresh(executor: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(executor, *args, **kwargs)

    def replace_once(function: Any) -> Any:
        seen = frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)
        if seen in replaced:
            return interpreter._LangPatchScope()
        replaced.add(seen)
        return replace(function)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter._patch_lang = replace_once
