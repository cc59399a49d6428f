"""Run code for `run_each`, each piece in a fork of a process that has imported PEFT's dependencies but not PEFT.

python tests/support/fresh_imports.py < JSON list of code; prints a JSON list of [exit status, output].
"""

import json
import os
import sys
import tempfile
import traceback

import peft  # noqa: F401


def forget(package: str) -> None:
    """Remove all modules of a package from sys.modules."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def run(code: str) -> tuple[int, str]:
    """Run code in a fork; return its exit status and output."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = 1
            try:
                exec(code, {"__name__": "__main__"})
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return status, output.read().strip()


if __name__ == "__main__":
    forget("peft")
    assert not {"peft", "lorasb"} & set(sys.modules)
    print(json.dumps([run(code) for code in json.load(sys.stdin)]))
