"""Build a model of any size without its weights: parameters are fake, buffers are real."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.weak import WeakIdKeyDictionary

from calque.errors import CalqueError, SourceUnreadable
from calque.memory import ran_out

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@contextmanager
def buildable(config: PreTrainedConfig) -> Iterator[None]:
    """Turn whatever a model's own constructor makes of absurd config values into one clear error.

    Raises:
        SourceUnreadable: with the model's type and what its code said.
    """
    try:
        yield
    except CalqueError:
        raise
    except Exception as error:  # constructors are foreign code and raise anything: KeyError, ZeroDivisionError…
        if ran_out(error):
            raise
        said = str(error).strip().partition("\n")[0]  # torch appends the frames of its own C++
        raise SourceUnreadable(
            f"config.json describes no {config.model_type} model that can be built: {type(error).__name__}: {said}",
            fix="check its values against the model's documentation",
        ) from error


def _never(parameter: torch.nn.Parameter) -> bool:
    return False


@contextmanager
def fake_parameters(mode: FakeTensorMode, stay_real: Callable[[torch.nn.Parameter], bool] = _never) -> Iterator[None]:
    """Every parameter that a module registers inside the block is a fake tensor of the same shape and dtype.

    Buffers stay real: ``with torch.device("meta")`` would lose the values of those that no checkpoint holds, such as
    RoPE's ``inv_freq``. Tied parameters stay one object. A parameter that ``stay_real`` accepts is left as it is.

    The fakes carry transformers' mark of a loaded parameter, so that its ``init_weights`` and torch's
    ``reset_parameters`` pass over them; buffers and real parameters are initialized as usual. The patch is global while
    the block runs: build on one thread.

    Args:
        mode: The fake mode that the parameters belong to; the exporter later wants the same one.
        stay_real: Asked once for each parameter.
    """
    from transformers.initialization import guard_torch_init_functions

    register = torch.nn.Module.register_parameter
    # By identity and weakly: a strong map would keep every large empty tensor, an id alone may be used twice.
    fakes = WeakIdKeyDictionary()

    def register_fake(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(module, name, param if param is None else _faked(param))

    def _faked(param: torch.nn.Parameter) -> torch.nn.Parameter:
        if isinstance(param, FakeTensor) or stay_real(param):
            return param
        if param not in fakes:
            # `torch.empty` memory is never touched, so the real tensor that is dropped here cost address space alone.
            with mode:
                data = torch.empty(param.shape, dtype=param.dtype, device=param.device)
            fake = torch.nn.Parameter(data, requires_grad=param.requires_grad)
            fake._is_hf_initialized = True  # type: ignore[attr-defined]
            fakes[param] = fake
        faked: torch.nn.Parameter = fakes[param]
        return faked

    torch.nn.Module.register_parameter = register_fake  # type: ignore[method-assign, assignment]
    try:
        with guard_torch_init_functions():
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
