"""PyTorch `.bin` checkpoints, read without torch and without executing their pickles.

`torch.save` writes a zip archive: `data.pkl` describes the tensors, and each storage is an uncompressed member. A
contiguous tensor is therefore a byte range of the file, as in safetensors, and is returned as one.

A pickle is a program. Python's unpickler calls whatever the pickle names, and can be crashed even when calls are
forbidden (hashing a deep tuple has no recursion limit). So `data.pkl` runs on our own minimal interpreter, which
supports only the opcodes that `torch.save` writes and only inert values: strings, numbers, tuples, dicts, and the
records below.
"""

import dataclasses
import math
import pathlib
import pickletools
import re
import struct
import zipfile
import zlib
from typing import Any, BinaryIO

from solar_jax.errors import UserError
from solar_jax.formats.safetensors import Entry

# Storage class -> dtype by its safetensors name.
_STORAGES = {
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch BFloat16Storage": "BF16",
    "torch HalfStorage": "F16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
    "torch ComplexFloatStorage": "C64",
    "torch UntypedStorage": "U8",
    "torch.storage UntypedStorage": "U8",
}
# Dtypes without a storage class of their own; their tensors use untyped storages.
_DTYPES = {
    "torch uint16": "U16",
    "torch uint32": "U32",
    "torch uint64": "U64",
    "torch float8_e4m3fn": "F8_E4M3",
    "torch float8_e5m2": "F8_E5M2",
}
_WIDTH = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8}
_WIDTH |= {"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_CALLS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_parameter_with_state",
    }
)
_GLOBALS = _CALLS | _STORAGES.keys() | _DTYPES.keys()

_MOST_BYTES = 1 << 23  # limit for data.pkl and for the zip directory; enough for 40,000 tensors
_MOST_VALUES = 1 << 16  # on the interpreter's stack; torch.save uses 2,000
_MOST_AXES = 64
_MOST_ARGUMENTS = 8  # per call; like axes, checked first, since a pickle can reuse one long tuple many times
_LOCAL = struct.Struct("<4s5H3L2H")  # a zip member's local header
_ENCRYPTED, _UTF8 = 0x1, 0x800  # flags of a zip member


@dataclasses.dataclass(frozen=True, slots=True)
class _Global:
    """A global named by the pickle; never imported."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    key: str  # stored as the member data/<key>
    code: str
    size: int  # elements


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    code: str
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return 0 in self.shape
            expected *= n
        return True


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """Byte range and checksum of an archive member."""

    start: int
    stop: int
    crc: int


class _Limited:
    """File wrapper that bounds each read by zipfile, since a zip directory may claim any size."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, n: int = -1) -> bytes:
        if n > _MOST_BYTES:
            raise ValueError(f"its directory has {n} bytes, the limit is {_MOST_BYTES}")
        return self._file.read(_MOST_BYTES if n < 0 else n)


def read_header(file: pathlib.Path) -> dict[str, Entry]:
    """Reads every tensor of a state dict written by `torch.save`, as a byte range of the file.

    Names that share a storage, such as tied weights, share a range. Checksums of the weights are not verified.

    Raises:
      UserError: the file is not such an archive or is damaged; it holds anything other than named tensors; or a tensor
        is not one contiguous byte range.
    """
    try:
        with file.open("rb") as f:
            return _read_header(file, f)
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}.") from e


def _read_header(file: pathlib.Path, f: BinaryIO) -> dict[str, Entry]:
    magic = f.read(4)
    if magic[:1] == b"\x80":
        raise UserError(f"{file}: is in the format of PyTorch before 1.6, expected a zip archive; save it again.")
    if magic != b"PK\x03\x04":
        raise UserError(f"{file}: is not a PyTorch checkpoint: expected a zip archive, found {magic!r}.")
    members = _members(file, f)
    pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise UserError(f"{file}: must hold data.pkl once, found it {len(pickles)} times.")
    root = pickles[0].removesuffix("data.pkl")
    if order := members.get(f"{root}byteorder"):
        found = _bytes(file, f, "byteorder", order, most=16)
        if found.strip() != b"little":
            raise UserError(f"{file}: byteorder must be 'little', found {found.decode('latin1')!r}.")
    try:
        state = _unpickle(_bytes(file, f, "data.pkl", members[pickles[0]], most=_MOST_BYTES))
    except UserError:
        raise
    except Exception as e:  # each opcode can fail in its own way; all are the file's fault
        raise UserError(f"{file}: data.pkl is not in torch.save's format: {_reason(e)}.") from e
    if type(state) is not dict:
        raise UserError(f"{file}: must hold a dict of tensors, found {_kind(state)}.")
    return {_name(file, name): _entry(file, name, value, members, root) for name, value in state.items()}


def _members(file: pathlib.Path, f: BinaryIO) -> dict[str, _Member]:
    """Returns the archive's members by name, checked: local headers match the directory and no two members overlap."""
    try:
        archive = zipfile.ZipFile(_Limited(f))  # type: ignore[arg-type]
        infos, end = archive.infolist(), archive.start_dir
    except Exception as e:  # zipfile raises a dozen exception types for a broken archive
        raise UserError(f"{file}: is not a complete zip archive: {_reason(e)}; is it cut short?") from e
    members: dict[str, _Member] = {}
    last = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name, shown = info.filename, _short(info.filename)
        if name in members:
            raise UserError(f"{file}: its directory lists {shown} twice.")
        if info.flag_bits & _ENCRYPTED:
            raise UserError(f"{file}: {shown} is encrypted.")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UserError(f"{file}: {shown} must be stored uncompressed, found it compressed.")
        if not last <= info.header_offset <= end:
            raise UserError(f"{file}: {shown} begins at byte {info.header_offset}, inside another member.")
        f.seek(info.header_offset)
        header = f.read(_LOCAL.size)
        if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
            raise UserError(f"{file}: no header for {shown} at byte {info.header_offset}; is it damaged?")
        _, _, flags, method, *_, name_size, extra_size = _LOCAL.unpack(header)
        local = f.read(name_size).decode("utf-8" if flags & _UTF8 else "cp437", "replace")
        if local != info.orig_filename or method != zipfile.ZIP_STORED:
            raise UserError(f"{file}: the header of {shown} does not match the directory, found {_short(local)}.")
        start = info.header_offset + _LOCAL.size + name_size + extra_size
        last = start + info.file_size
        if last > end:
            raise UserError(f"{file}: {shown} should end at byte {last}, but the members end at {end}.")
        members[name] = _Member(start, last, info.CRC)
    return members


def _bytes(file: pathlib.Path, f: BinaryIO, name: str, member: _Member, most: int) -> bytes:
    if member.stop - member.start > most:
        raise UserError(f"{file}: {name} has {member.stop - member.start} bytes, the limit is {most}.")
    f.seek(member.start)
    data = f.read(member.stop - member.start)
    if member.crc not in (0, zlib.crc32(data)):  # 0: saved without checksums
        raise UserError(f"{file}: {name} does not match its checksum; is it damaged?")
    return data


def _unpickle(data: bytes) -> Any:
    """Returns the object that a torch.save pickle describes.

    Raises:
      Exception: of any type, for any other pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(n: int) -> list[Any]:
        """Pops the last n values."""
        if n > len(stack) - (marks[-1] if marks else 0):
            raise ValueError("an operation lacks its operands")
        values = stack[len(stack) - n :]
        del stack[len(stack) - n :]
        return values

    def since_mark() -> list[Any]:
        values = stack[marks[-1] :]
        del stack[marks.pop() :]
        return values

    for opcode, argument, _ in pickletools.genops(data):
        arg: Any = argument
        if len(stack) + len(marks) > _MOST_VALUES:
            raise ValueError(f"the stack holds more than {_MOST_VALUES} values")
        match opcode.name:
            case "PROTO":
                if arg != 2:
                    raise ValueError(f"the pickle's protocol must be 2, found {arg}")
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "BINFLOAT":
                stack.append(arg)
            case "LONG1":
                if not -(1 << 63) <= arg < 1 << 63:
                    raise ValueError("a number has more than 64 bits")
                stack.append(arg)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                values = pop(1) if opcode.name == "APPEND" else since_mark()
                _of_type(list, stack[-1]).extend(values)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                values = pop(2) if opcode.name == "SETITEM" else since_mark()
                _set(_of_type(dict, stack[-1]), values)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                if arg not in _GLOBALS:
                    raise ValueError(f"it names {_short(arg.replace(' ', '.'))}, which is no part of a dict of tensors")
                stack.append(_Global(arg))
            case "BINPERSID":
                stack.append(_storage(*pop(1)))
            case "REDUCE":
                stack.append(_call(*pop(2)))
            case "BUILD":  # attributes, which torch.save writes for state dicts only; irrelevant to tensors
                pop(1)
                _of_type(dict, stack[-1])
            case "STOP":
                break
            case name:
                raise ValueError(f"it has the unsupported operation {name}")
    (result,) = stack
    return result


def _of_type(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, found {_kind(value)}")
    return value


def _set(target: dict[Any, Any], values: list[Any]) -> None:
    """Adds alternating keys and values; only key types with a cheap hash are allowed."""
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) not in (str, int):
            raise ValueError(f"a dict's keys must be strings or integers, found {_kind(key)}")
        if key in target:
            raise ValueError(f"the key {_short(key)} appears twice")
        target[key] = value


def _storage(persistent_id: Any) -> _Storage:
    match persistent_id:
        case ("storage", _Global(name), str(key), str(), int(size)) if name in _STORAGES and len(key) < 100:
            return _Storage(key, _STORAGES[name], size)
    raise ValueError(f"a storage is malformed: {_kind(persistent_id)}")


def _call(target: Any, args: Any) -> Any:
    """Evaluates a call to one of the globals that make up a dict of tensors."""
    name = _of_type(_Global, target).name
    if len(_of_type(tuple, args)) > _MOST_ARGUMENTS:
        raise ValueError(f"the call to {name.replace(' ', '.')} has {len(args)} arguments")
    match name.rpartition(" ")[2], args:
        case "OrderedDict", ():
            return {}
        case "_rebuild_parameter", (_Tensor() as tensor, bool(), _):
            return tensor
        case "_rebuild_parameter_with_state", (_Tensor() as tensor, bool(), _, _):
            return tensor
        case "_rebuild_tensor_v2", (_Storage() as storage, offset, shape, strides, bool(), _, *metadata):
            return _tensor(storage, storage.code, offset, shape, strides, metadata)
        case "_rebuild_tensor_v3", (_Storage() as storage, offset, shape, strides, bool(), _, _Global(kind), *metadata):
            if kind in _DTYPES:
                return _tensor(storage, _DTYPES[kind], offset, shape, strides, metadata)
    raise ValueError(f"the call to {name.replace(' ', '.')} is malformed")


def _tensor(storage: _Storage, code: str, offset: Any, shape: Any, strides: Any, metadata: list[Any]) -> _Tensor:
    if any(metadata):  # flags for negated or conjugated storage
        raise ValueError("a tensor is stored negated or conjugated")
    if not len(_of_type(tuple, shape)) == len(_of_type(tuple, strides)) <= _MOST_AXES:
        raise ValueError(f"a tensor has {len(shape)} axes and {len(strides)} strides")
    if not all(type(n) is int and n >= 0 for n in (storage.size, offset, *shape, *strides)):
        raise ValueError("a tensor's size, offset, shape or strides are malformed")
    return _Tensor(storage, code, offset, shape, strides)


def _name(file: pathlib.Path, name: Any) -> str:
    if type(name) is not str or not name.isprintable() or len(name) > 1000:
        raise UserError(f"{file}: a tensor's name must be a printable string, found {_short(name)}.")
    return name


def _entry(file: pathlib.Path, name: str, value: Any, members: dict[str, _Member], root: str) -> Entry:
    """Returns the tensor's byte range, if it is contiguous."""
    if type(value) is not _Tensor:
        raise UserError(f"{file}: {name} must be a tensor in a flat dict, found {_kind(value)}.")
    key, stored = value.storage.key, _WIDTH[value.storage.code] * value.storage.size
    member = members.get(f"{root}data/{key}")
    if member is None:
        raise UserError(f"{file}: the storage {_short(key)} of {name} is missing.")
    if member.stop - member.start < stored:
        raise UserError(f"{file}: the storage of {name} must have {stored} bytes, found {member.stop - member.start}.")
    if not value.contiguous:
        raise UserError(f"{file}: {name} must be contiguous, found strides {value.strides} for {value.shape}.")
    width = _WIDTH[value.code]
    start = member.start + value.offset * width
    stop = start + math.prod(value.shape) * width
    if stop > member.start + stored:
        raise UserError(f"{file}: {name} of {value.code} {value.shape} does not fit its storage of {stored} bytes.")
    return Entry(file, value.code, value.shape, start, stop)


def _kind(value: Any) -> str:
    """Names the type of an interpreter value, which may be nested too deeply to print."""
    match value:
        case _Tensor():
            return "a tensor"
        case _Storage():
            return "a storage"
        case _Global(name):
            return name.replace(" ", ".")
    return "None" if value is None else type(value).__name__


def _short(value: str | int) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


def _reason(e: Exception) -> str:
    """Returns an exception's text on one line, without a final full stop."""
    text = " ".join(str(e).split()).rstrip(".")[:300]
    return text if text and not isinstance(e, LookupError) else f"{type(e).__name__} {text}".rstrip()
