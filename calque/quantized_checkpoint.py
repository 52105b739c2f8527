"""Quantized checkpoints: from the tensors that a format stores for each weight to one weight, as if it were stored as numbers.

::

    before  model.layers.0.mlp.up_proj.qweight  .qzeros  .scales  .g_idx        headers
    after   model.layers.0.mlp.up_proj.weight   Dequantized, whose integers can be kept

Names of modules stay the checkpoint's own. What is read here besides headers says how large a weight is, and which group an input
is in. No vendor's package is needed; how activations were to be quantized is not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calque.errors import SourceUnreadable, Unsupported
from calque.quantization import Scheme
from calque.stored_integers import Dequantized, Grouped, held_group
from calque.weights import Stored, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from calque.quantization import Quantized

Settings = Mapping[str, Any]
Parts = Mapping[str, Stored]

MISSING_FIX = "check that every shard is there, and that config.json belongs to these weights"
OTHER_FIX = "convert the model that was not quantized, or one quantized by gptq, awq, compressed-tensors, bitsandbytes or fp8"
# A suffix that stands for any ending: bitsandbytes names the kind of number in it.
STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Format:
    """One way to store a weight, by the suffixes of a module's tensors.

    ``marks`` are needed, and no other module has them; ``needs`` too; ``takes`` may be there. ``make`` joins what is there.
    ``waived``: those of any module that say how to quantize activations or caches.
    """

    marks: tuple[str, ...]
    make: Callable[[Parts, Settings], Dequantized]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    waived: tuple[str, ...] = ()


def joined(tensors: Mapping[str, Stored], quantization: Settings, origin: str) -> dict[str, Weight]:
    """Return the checkpoint's weights by name, those of each quantized layer joined into one float weight.

    Raises:
        Unsupported: a method, a version of it or a kind of number that cannot be read, by name.
        SourceUnreadable: weights without their scales, or tensors that do not fit together; all of them.
    """
    formats, found = formats_of(quantization, origin), dict[str, Weight](tensors)
    problems: list[str] = []
    for form in formats:
        for module, parts in _modules(found, form).items():
            if missing := [suffix for suffix in (*form.needs, *form.marks) if suffix not in parts]:
                problems += [f"{module}.{suffix}  missing beside {module}.{next(iter(parts))}" for suffix in missing]
                continue
            try:
                made = form.make(parts, quantization)
            except (KeyError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
                problems.append(f"{module}  {_shapes(parts)}: {error}")
                continue
            for suffix in parts:
                del found[f"{module}.{_named(suffix, module, found)}"]
            found[f"{module}.weight"] = made
        for name in [name for name in found if name.endswith(tuple(f".{suffix}" for suffix in form.waived))]:
            del found[name]
    problems += [f"{name}  {stored.dtype} without scales" for name, stored in found.items() if _lost(name, stored)]
    if problems:
        raise SourceUnreadable(f"the quantized weights of {origin} are incomplete or do not fit together", problems, MISSING_FIX)
    return found


def _lost(name: str, weight: Weight) -> bool:
    """Return whether a weight is stored as no numbers, and was taken by no format."""
    return isinstance(weight, Stored) and name.endswith(".weight") and weight.dtype in ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2")


def _modules(tensors: Mapping[str, Weight], form: Format) -> dict[str, dict[str, Stored]]:
    """Return the tensors of each module that has one of the format's marks, by suffix."""
    modules: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        for suffix in (*form.marks, *form.needs, *form.takes):
            if isinstance(stored, Stored) and (name.endswith(f".{suffix}") or (suffix == STATE and f".{suffix}" in name)):
                modules.setdefault(name[: name.rindex(f".{suffix}")], {})[suffix] = stored
                break
    return {module: parts for module, parts in modules.items() if any(mark in parts for mark in form.marks)}


def _named(suffix: str, module: str, tensors: Mapping[str, Weight]) -> str:
    """Return the whole ending of a tensor's name."""
    if suffix != STATE:
        return suffix
    return next(name for name in tensors if name.startswith(f"{module}.{STATE}"))[len(module) + 1 :]


def _shapes(parts: Parts) -> str:
    return ", ".join(f"{suffix} {stored.dtype} {list(stored.shape)}" for suffix, stored in parts.items())


def formats_of(settings: Settings, origin: str) -> tuple[Format, ...]:
    """Return the formats of the checkpoint's method, its version and bits being such as can be read.

    Raises:
        Unsupported: they are not; the method by name, and what else is not known.
    """
    method = method_of(settings)
    faults = list(_faults(method, settings))
    if method not in FORMATS or faults:
        raise Unsupported(f"{origin} is quantized by {method or 'a method it does not name'}, which cannot be read", faults, OTHER_FIX)
    if method == "bitsandbytes":
        return FORMATS["bitsandbytes 4-bit" if settings.get("load_in_4bit") else "bitsandbytes"]
    return FORMATS[method]


def method_of(settings: Settings) -> str:
    """Return the name of the method; the first checkpoints of bitsandbytes do not say it."""
    bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return str(settings.get("quant_method") or ("bitsandbytes" if bits else ""))


def _faults(method: str, settings: Settings) -> Iterator[str]:
    """Yield the settings that ask for another layout of the bytes than is known."""
    if method == "gptq":
        layout = "marlin" if settings.get("is_marlin_format") else settings.get("checkpoint_format") or settings.get("format") or "gptq"
        yield from _unknown("checkpoint_format", layout, ("gptq", "gptq_v2"))
        yield from _unknown("pack_dtype", settings.get("pack_dtype", "int32"), ("int32",))
    if method == "awq":
        yield from _unknown("version", str(settings.get("version") or settings.get("format") or "gemm").lower(), ("gemm",))
        yield from _unknown("bits", settings.get("bits", settings.get("w_bit", 4)), (4,))
    if method == "compressed-tensors":
        groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, Mapping)]
        for layout in dict.fromkeys([settings.get("format"), *(group.get("format") for group in groups)]):
            yield from _unknown("format", layout or COMPRESSED[0], COMPRESSED)
        yield from _unknown("sparsity_config", (settings.get("sparsity_config") or {}).get("format") or "dense", ("dense",))


def _unknown(key: str, found: Any, known: tuple[Any, ...]) -> Iterator[str]:
    if found not in known:
        yield f"{key}: {found}  known: {', '.join(map(str, known))}"


def _gptq(parts: Parts, settings: Settings) -> Dequantized:
    """Return a weight of GPTQ; its bits follow from the shapes, for modules may have bits of their own."""
    from calque import stored_formats

    qweight, qzeros, scales = (parts[suffix] for suffix in ("qweight", "qzeros", "scales"))
    groups, rows = scales.shape
    bits = qzeros.shape[1] * 32 // rows
    size = qweight.shape[0] * 32 // bits
    _require(2 <= bits <= 8 and qzeros.shape[0] == groups and qweight.shape[1] == rows, "sizes differ")
    group = _group(int(settings.get("group_size", -1)), size, groups)
    index = _out_of_order(parts.get("g_idx"), size, group)
    less = 0 if (settings.get("checkpoint_format") or settings.get("format")) == "gptq_v2" else 1
    symmetric = bool(settings.get("sym"))

    def read() -> Grouped:
        tensors = (qweight.read(), qzeros.read(), scales.read())
        return _checked(stored_formats.gptq(*tensors, _index(index, size, group), bits, less), symmetric)

    return _grouped("gptq", (qweight, qzeros, scales), read, (rows, size), _Integers(bits, symmetric, group, index))


def _awq(parts: Parts, settings: Settings) -> Dequantized:
    from calque import stored_formats

    qweight, qzeros, scales = sources = tuple(parts[suffix] for suffix in ("qweight", "qzeros", "scales"))
    (groups, rows), size = scales.shape, qweight.shape[0]
    _require(qweight.shape[1] * 8 == rows and qzeros.shape == (groups, qweight.shape[1]), "sizes differ")
    group = _group(int(settings.get("group_size", settings.get("q_group_size", -1))), size, groups)

    def read() -> Grouped:
        return stored_formats.awq(qweight.read(), qzeros.read(), scales.read(), _index(None, size, group))

    return _grouped("awq", sources, read, (rows, size), _Integers(4, False, group))


def _pack_quantized(parts: Parts, settings: Settings) -> Dequantized:
    from calque import stored_formats

    packed, scale, zero_point = parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point")
    rows, size = (int(number) for number in parts["weight_shape"].read())
    # A row fills whole words, so this is exact from 32 inputs on.
    bits = packed.shape[1] * 32 // size
    _require(1 <= bits <= 8 and packed.shape[0] == rows, "sizes differ")
    group = _group(-1, size, scale.shape[1] if len(scale.shape) == 2 else 1)
    index = _out_of_order(parts.get("weight_g_idx"), size, group)

    def read() -> Grouped:
        zero = None if zero_point is None else zero_point.read()
        return stored_formats.packed_rows(packed.read(), scale.read(), zero, _index(index, size, group), bits, rows)

    return _grouped("compressed-tensors", tuple(parts.values()), read, (rows, size), _Integers(bits, zero_point is None, group, index))


def _plain(parts: Parts, settings: Settings) -> Dequantized:
    """Return a weight of compressed-tensors that is stored one number a byte, an integer or a float8."""
    from calque import stored_formats

    weight, scale, zero_point = parts["weight"], parts["weight_scale"], parts.get("weight_zero_point")
    rows, size = weight.shape
    if weight.dtype == "F8_E4M3":
        return _float8("compressed-tensors", weight, scale, _structure(settings))
    _require(weight.dtype == "I8", f"{weight.dtype} has scales; I8 and F8_E4M3 are known")
    group = _group(-1, size, scale.shape[1] if len(scale.shape) == 2 else 1)
    _require(scale.shape in ((), (1,), (1, 1)) or scale.shape[0] == rows, "integers have a scale for each row, or one")

    def read() -> Grouped:
        zero = None if zero_point is None else zero_point.read()
        return stored_formats.plain_integers(weight.read(), scale.read(), zero, _index(None, size, group))

    return _grouped("compressed-tensors", tuple(parts.values()), read, (rows, size), _Integers(8, zero_point is None, group))


def _structure(settings: Settings) -> list[int] | None:
    """Return rows and columns of the blocks that the config names first."""
    groups = [group.get("weights") or {} for group in (settings.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    return next((group["block_structure"] for group in groups if group.get("block_structure")), None)


def _int8(parts: Parts, settings: Settings) -> Dequantized:
    from calque import stored_formats

    weight, largest = parts["weight"], parts["SCB"]
    _require(weight.dtype == "I8" and largest.shape == weight.shape[:1], "sizes differ")
    if "weight_format" in parts:
        _require(not parts["weight_format"].read().any(), "weight_format is not row by row")
    rows, size = weight.shape

    def read() -> Grouped:
        return stored_formats.bitsandbytes_int8(weight.read(), largest.read())

    return _grouped("bitsandbytes", (weight, largest), read, (rows, size), _Integers(8, True, size))


def _4bit(parts: Parts, settings: Settings) -> Dequantized:
    from calque import stored_formats

    state = json.loads(bytes(parts[STATE].read().tolist()))
    rows, columns = shape = (int(state["shape"][0]), int(state["shape"][1]))
    packed, absmax, table = parts["weight"], parts["weight.absmax"], parts["weight.quant_map"]
    nested = [parts[suffix] for suffix in ("weight.nested_quant_map", "weight.nested_absmax") if suffix in parts]
    _require(packed.nbytes * 2 >= rows * columns and absmax.shape[0] * state["blocksize"] >= rows * columns, "sizes differ")
    _require(len(nested) in (0, 2) and (absmax.dtype != "U8" or bool(nested)), "absmax is nested, its own scales are missing")

    def read() -> Tensor:
        largest = absmax.read()
        if nested:
            outer = (nested[0].read(), nested[1].read())
            largest = stored_formats.bitsandbytes_absmax(largest, *outer, state["nested_blocksize"], state["nested_offset"])
        return stored_formats.bitsandbytes_4bit(packed.read(), largest, table.read(), shape, state["blocksize"])

    return _numbers(f"bitsandbytes {state['quant_type']}", tuple(parts.values()), read, shape)


def _fp8(parts: Parts, settings: Settings) -> Dequantized:
    weight = parts["weight"]
    _require(weight.dtype == "F8_E4M3", f"{weight.dtype} has scales; F8_E4M3 is known")
    return _float8("fp8", weight, parts["weight_scale_inv"], settings.get("weight_block_size"))


def _float8(method: str, weight: Stored, scale: Stored, block: Any) -> Dequantized:
    """Return float8 numbers with one scale a block; ``block``: what the config says, which may be of other weights."""
    from calque import stored_formats

    rows, columns = weight.shape
    grid = scale.shape if len(scale.shape) == 2 else (1, 1)
    if not block or (-(-rows // block[0]), -(-columns // block[1])) != grid:
        _require(rows % grid[0] == 0 and columns % grid[1] == 0, "its scales are of no block that the config names")
        block = (rows // grid[0], columns // grid[1])
    size = (int(block[0]), int(block[1]))
    whole = " a tensor" if grid == (1, 1) else " a row" if size == (1, columns) else f" a block of {size[0]}x{size[1]}"

    def read() -> Tensor:
        return stored_formats.float8(weight.read(), scale.read(), size)

    return _numbers(f"{method} e4m3, one scale{whole}", (weight, scale), read, (rows, columns))


@dataclass(frozen=True)
class _Integers:
    """How the integers of one weight lie; ``index``: the group of each input where neighbours need not share one."""

    bits: int
    symmetric: bool
    group: int
    index: Tensor | None = None


def _grouped(method: str, sources: tuple[Stored, ...], read: Callable[[], Grouped], shape: tuple[int, int], how: _Integers) -> Dequantized:
    """Return the weight, and how its integers can be kept: 4 bits hold fewer as well, and long groups are several short ones."""
    rows, size = shape
    held = held_group(how.index, size, how.group)
    scheme = None if held is None else Scheme(4 if how.bits <= 4 else 8, held, how.symmetric, search=False)
    one = how.group >= size and how.index is None
    form = f"{method} int{how.bits}{'' if how.symmetric else '-asymmetric'}{'' if one else f'-g{how.group}'}"
    if how.index is not None and held is None:
        form += " in order of activations"

    def kept() -> Quantized:
        return read().kept(held or 0)

    # Its values are the checkpoint's own: rounding them is not rounding what they are made of, so it counts as moved.
    return Dequantized((), f"dequantize({form})", lambda: read().numbers(), "float32", (rows, size), form=form, scheme=scheme,
                       integers=kept, stored=sources)  # fmt: skip


def _numbers(form: str, sources: tuple[Stored, ...], read: Callable[[], Tensor], shape: tuple[int, int]) -> Dequantized:
    return Dequantized((), f"dequantize({form})", read, "float32", shape, form=form, stored=sources)


def _checked(grouped: Grouped, symmetric: bool) -> Grouped:
    """Return the integers, without zero points where the config says so and all of them are in the middle."""
    if not symmetric:
        return grouped
    assert grouped.zero_point is not None
    if grouped.zero_point.any():
        raise SourceUnreadable(
            "config.json says sym: true, but a weight has zero points that are not in the middle",
            fix='write "sym": false into its quantization_config; the integers are the same',
        )
    return Grouped(grouped.q, grouped.scale, None, grouped.index)


def _group(asked: int, size: int, groups: int) -> int:
    """Return how many neighbours share a scale: what the config says, unless the module has another number of groups."""
    if asked > 0 and -(-size // asked) == groups:
        return asked
    _require(size % groups == 0, f"{groups} groups do not divide {size} inputs")
    return size // groups


def _out_of_order(stored: Stored | None, size: int, group: int) -> Tensor | None:
    """Return the group of each input where that is not the one of its neighbours."""
    if stored is None:
        return None
    index = stored.read()
    _require(len(index) == size, f"{len(index)} inputs have a group, there are {size}")
    return None if index.equal(_index(None, size, group).to(index.dtype)) else index


def _index(index: Tensor | None, size: int, group: int) -> Tensor:
    import torch

    return torch.arange(size) // group if index is None else index.long()


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)


COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale")
FORMATS: dict[str, tuple[Format, ...]] = {
    "gptq": (Format(("qweight", "qzeros", "scales"), _gptq, takes=("g_idx",)),),
    "awq": (Format(("qweight", "qzeros", "scales"), _awq),),
    "compressed-tensors": (
        Format(("weight_packed", "weight_shape"), _pack_quantized, ("weight_scale",), ("weight_zero_point", "weight_g_idx"), ACTIVATIONS),
        Format(("weight_scale",), _plain, ("weight",), ("weight_zero_point",), ACTIVATIONS),
    ),
    "bitsandbytes": (Format(("SCB",), _int8, ("weight",), ("weight_format",)),),
    "bitsandbytes 4-bit": (
        Format(("weight.absmax", "weight.quant_map", STATE), _4bit, ("weight",), ("weight.nested_absmax", "weight.nested_quant_map")),
    ),
    "fp8": (Format(("weight_scale_inv",), _fp8, ("weight",), waived=("activation_scale",)),),
}
