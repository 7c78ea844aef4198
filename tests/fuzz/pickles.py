"""Ways to damage .bin files, for the fuzz test: pickles that would run something or say nonsense, and broken zips."""

import io
import itertools
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from tests.fuzz.damage import Damage, Files, flipped, pick


def members(data: bytes) -> dict[str, bytes]:
    """The content of an archive's files as they lie there, whatever checksums and flags say."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        places = {info.filename: place(data, info) for info in archive.infolist()}
    return {name: data[start:stop] for name, (start, stop) in places.items()}


def place(data: bytes, info: zipfile.ZipInfo) -> tuple[int, int]:
    """The bytes of a file that is stored as it is."""
    name_size, extra_size = struct.unpack("<2H", data[info.header_offset + 26 : info.header_offset + 30])
    start = info.header_offset + 30 + name_size + extra_size
    return start, start + info.file_size


def archive_of(content: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return out.getvalue()


def with_pickle(rng: random.Random, files: Files, change: Callable[[bytes], bytes]) -> None:
    name = pick(rng, files, ".bin")
    content = members(files[name])
    key = next(k for k in content if k.endswith("/data.pkl"))
    content[key] = change(content[key])
    files[name] = archive_of(content)


class Calls:
    """The call that unpickling this would make."""

    def __init__(self, function: str, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        module, _, name = self.function.rpartition(".")
        return getattr(__import__(module, fromlist=[name]), name), self.args


def hostile(m: str) -> Damage:
    """Pickles whose unpickling would make the file `m`."""
    python = f"open({m!r}, 'w').close()"
    calls = [
        ("os.system", f"touch {m}"), ("posix.system", f"touch {m}"), ("builtins.exec", python), ("io.open", m, "w"),
        ("builtins.eval", python), ("builtins.open", m, "w"), ("subprocess.call", ["touch", m]), ("os.mknod", m),
        ("subprocess.Popen", ["touch", m]), ("os.mkdir", m), ("os.symlink", "x", m), ("timeit.timeit", "pass", python),
        ("pickle.loads", pickle.dumps(Calls("os.mkdir", m), 2)), ("torch.save", {}, m), ("numpy.save", m, [1]),
        ("logging.FileHandler", m), ("shutil.copyfile", __file__, m),
    ]  # fmt: skip

    def damage(rng: random.Random, files: Files) -> None:
        evil, protocol = Calls(*rng.choice(calls)), rng.randrange(6)
        whole = pickle.dumps(rng.choice([evil, {"x": evil}, [evil], {"x": (evil, 1)}]), protocol)
        # As one more entry of the dict that torch.save wrote, before its SETITEMS; or in place of all.
        body = pickle.dumps(evil, 2)[2:-1]

        def change(data: bytes) -> bytes:
            at = [pos for op, _, pos in pickletools.genops(data) if op.name in ("SETITEMS", "BUILD", "STOP", "REDUCE")]
            spot = rng.choice(at)
            return rng.choice(
                [whole, data[:spot] + b"X\x01\x00\x00\x00x" + body + data[spot:], data[:-1] + body + b"."]
            )

        with_pickle(rng, files, change)

    return damage


def _operations(data: bytes) -> list[bytes]:
    at = [pos for _, _, pos in pickletools.genops(data)] + [len(data)]
    return [data[a:b] for a, b in itertools.pairwise(at)]


def _any_operation(rng: random.Random) -> bytes:
    """One of any protocol, with an argument that may be too large or too small."""
    opcode = rng.choice(pickletools.opcodes)
    n = rng.choice([0, 1, 2, 3, 5, 40, 255])
    return opcode.code.encode("latin1") + rng.choice(
        [b"", bytes([n]), struct.pack("<H", n), struct.pack("<I", n), struct.pack("<Q", n), b"\xff" * 4, b"%d\n" % n,
         b"os\nsystem\n", b"torch._utils\n_rebuild_tensor_v2\n", struct.pack("<I", n) + b"x" * n, bytes([n]) + b"x" * n]
    )  # fmt: skip


def mutated_pickle(rng: random.Random, files: Files) -> None:
    def change(data: bytes) -> bytes:
        operations = _operations(data)
        for _ in range(rng.choice([1, 1, 2, 5])):
            i, j = (rng.randrange(len(operations)) for _ in range(2))
            match rng.choice(["lose", "double", "swap", "insert", "replace", "flip", "run"]):
                case "lose":
                    operations[i : i + rng.choice([1, 1, 3])] = [b""]
                case "double":
                    operations.insert(j, operations[i])
                case "swap":
                    operations[i], operations[j] = operations[j], operations[i]
                case "insert":
                    operations.insert(i, _any_operation(rng))
                case "replace":
                    operations[i] = _any_operation(rng)
                case "flip":
                    operations[i] = flipped(rng, operations[i] or b"\0", 0, max(len(operations[i]), 1))
                case "run":  # as deep or as long as a small file can be made
                    operations[i:i] = [_any_operation(rng)] * rng.choice([100, 5000])
        return b"".join(operations)

    with_pickle(rng, files, change)


def any_pickle(rng: random.Random, files: Files) -> None:
    """Sound pickles, of all protocols, of other things than a dict of tensors."""
    things = [1, "x", None, [1], {}, {"x": 1}, {1: "x"}, set("ab"), b"x", bytearray(b"x"), 1j, range(3), 10**100]
    things += [{"x": {}}, ({},), {"x": [1] * 1000}]
    with_pickle(rng, files, lambda data: pickle.dumps(rng.choice(things), rng.randrange(6)))


# ---- Zip ---------------------------------------------------------------------------------------------------


def directory(data: bytes) -> tuple[int, int]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.start_dir, len(data)


def first_members(data: bytes) -> tuple[int, int]:
    """data.pkl and its header, and the headers of the next."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return 0, archive.infolist()[3].header_offset


def changed_weights(rng: random.Random, files: Files) -> None:
    name = pick(rng, files, ".bin")
    data = files[name]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = rng.choice([i for i in archive.infolist() if "/data/" in i.filename])
    files[name] = flipped(rng, data, *place(data, info))
