"""Importing the package loads its operators and registers rules for them; nothing else changes."""

import json
import subprocess
import sys
import types

import pytest

import torch_onebit

# what a process may notice: names are looked up before and after the import
STATE = {
    "environment": "dict(os.environ)",
    "warnings": "[str(f) for f in warnings.filters]",
    "threads of torch": "[torch.get_num_threads(), torch.get_num_interop_threads()]",
    "threads": "[threading.active_count(), len(threads())]",
    "signal handlers": "[str(signal.getsignal(s)) for s in sorted(signal.valid_signals())]",
    "search path": "list(sys.path)",
    "loggers": "[logging.root.level, len(logging.root.handlers)]",
    "random numbers": "torch.get_rng_state().tolist()",
    "defaults": "[str(torch.get_default_dtype()), torch.is_grad_enabled()]",
    "hooks of all modules": "[len(v) for k, v in vars(module).items() if k.startswith('_global_')"
    " and hasattr(v, '__len__')]",
    "attributes of torch's classes": "{f'{c.__module__}.{c.__qualname__}': names(c)"
    " for c in classes()}",
    "functions of torch": "{f'{m.__name__}.{k}': id(v) for m in before for k, v in"
    " list(vars(m).items()) if isinstance(v, types.FunctionType)}",
}
PROGRAM = """
import json, logging, os, pathlib, signal, sys, threading, types, warnings
import numpy, torch, tqdm.auto
from torch.nn.modules import module
from torch.optim import swa_utils
before = [m for n, m in list(sys.modules.items()) if n.split(".")[0] == "torch" and m]
def threads(): return list(pathlib.Path("/proc/self/task").glob("*"))
def classes():
    found = [v for m in before for v in list(vars(m).values()) if isinstance(v, type)]
    return {id(c): c for c in found if c.__module__.split(".")[0] == "torch"}.values()
def names(c): return {k: id(v) for k, v in list(vars(c).items())}
def state(): return {k: eval(v) for k, v in STATE.items()}
STATE = json.loads(sys.argv[1])
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # names of torch that warn when they are looked at
    old = state()
EXTRA
import torch_onebit
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    new = state()
print(json.dumps([k for k in STATE if old[k] != new[k]]))
"""


def changed(extra: str = "") -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("EXTRA", extra), json.dumps(STATE)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_changes_nothing_of_the_process_or_of_torch():
    assert changed() == []


# What an import could do, and the row that must notice.
INTRUSIONS = {
    "environment": "os.environ['OMP_WAIT_POLICY'] = 'ACTIVE' + str(os.getpid())",
    "warnings": "import warnings as w; w.filterwarnings('ignore', 'a message of torch')",
    "threads of torch": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "threads": "threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "hooks of all modules": "module.register_module_forward_hook(lambda *a: None)",
    "attributes of torch's classes": "swa_utils.AveragedModel.update_parameters = print",
    "functions of torch": "torch.nn.functional.linear2 = torch.nn.functional.gelu;"
    " torch.nn.functional.softmax = lambda *a: None",
    "random numbers": "torch.rand(3)",
}


def test_what_an_import_must_not_do_would_be_noticed():
    assert set(INTRUSIONS) <= set(changed("; ".join(INTRUSIONS.values())))


def test_every_public_name_is_in_all():
    public = {
        name
        for name, value in vars(torch_onebit).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public - {"load", "version", "PackageNotFoundError"} == set(torch_onebit.__all__)
    assert torch_onebit.__all__ == sorted(torch_onebit.__all__, key=lambda n: (not n.isupper(), n))


@pytest.mark.parametrize("module", ["ops", "nn", "qat", "checkpoint"])
def test_a_part_that_names_what_is_public_names_it_all(module):
    part = getattr(torch_onebit, module)
    exported = {
        n
        for n, v in vars(part).items()
        if not n.startswith("_") and getattr(v, "__module__", "").startswith(part.__name__)
    }
    assert exported - {"register"} <= set(part.__all__)
    assert all(hasattr(part, n) for n in part.__all__)
