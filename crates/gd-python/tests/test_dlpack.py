"""Arrays of other libraries through DLPack: how their memory is described, and that it is released exactly once."""

import ctypes

import numpy as np
import pytest

import gd_attention as gd

CPU, FLOAT, COMPLEX = 1, 2, 5


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Legacy(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", DELETER)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


class Producer:
    """An array of NumPy that exports capsules as it is told, and counts how often each is released."""

    def __init__(self, array, versioned=True, version=(1, 0), flags=0, offset=0, same_capsule=False, **fields):
        self.array, self.fields, self.offset = array, fields, offset
        self.versioned, self.version, self.flags = versioned, version, flags
        self.same_capsule, self.capsule = same_capsule, None
        self.exported = self.released = 0
        self.kept = []

    def __dlpack_device__(self):
        return (self.fields.get("device_type", CPU), 0)

    def __dlpack__(self, **_):
        if self.capsule is not None and self.same_capsule:
            return self.capsule
        managed = Versioned() if self.versioned else Legacy()
        if self.versioned:
            (managed.major, managed.minor), managed.flags = self.version, self.flags
        tensor, array = managed.tensor, self.array
        tensor.data, tensor.byte_offset = array.ctypes.data - self.offset, self.offset
        tensor.device_type, tensor.ndim = CPU, array.ndim
        tensor.code, tensor.bits, tensor.lanes = FLOAT, 8 * array.itemsize, 1
        sizes = ctypes.c_int64 * max(array.ndim, 1)
        tensor.shape = sizes(*array.shape)
        tensor.strides = sizes(*(stride // array.itemsize for stride in array.strides))
        for name, value in self.fields.items():
            setattr(tensor, name, value)

        def release(_):
            self.released += 1

        managed.deleter = DELETER(release)
        self.kept.append(managed)
        self.exported += 1
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        self.capsule = new(ctypes.addressof(managed), name, None)
        return self.capsule


def inputs():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in [(1, 2, 3, 8), (1, 2, 9, 8), (1, 2, 9, 4)]]


def scan(k):
    return gd.scan(inputs()[0], k, beta=0.5, candidates=2)


def layouts():
    k = inputs()[1]
    room = np.zeros(k.size + 5, np.float32)
    room[5:] = k.ravel()
    yield "in order", k, {}
    yield "legacy", k, {"versioned": False}
    yield "without strides", k, {"versioned": False, "strides": None}
    yield "read-only", k, {"flags": 1}
    yield "a later minor version", k, {"version": (1, 99)}
    yield "a byte offset", room[5:].reshape(k.shape), {"offset": 20}
    yield "a byte offset and reversed", np.ascontiguousarray(k[:, :, ::-1])[:, :, ::-1], {"offset": 4}
    yield "transposed", np.ascontiguousarray(k.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3), {}
    yield "gaps", np.repeat(k, 2, 2)[:, :, ::2], {}


@pytest.mark.parametrize(("array", "options"), [pytest.param(*rest, id=name) for name, *rest in layouts()])
def test_every_description_of_the_same_array_gives_the_same_result(array, options):
    expected = scan(inputs()[1])
    producer = Producer(array, **options)
    found = scan(producer)
    assert np.array_equal(found.index, expected.index) and np.array_equal(found.energy, expected.energy)
    assert (producer.exported, producer.released) == (1, 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"code": COMPLEX, "bits": 64}, "k has the DLPack dtype (code 5, 64 bits, 1 lanes)"),
        ({"code": 0, "bits": 16}, "k has the DLPack dtype (code 0, 16 bits, 1 lanes)"),
        ({"lanes": 2}, "k has the DLPack dtype (code 2, 32 bits, 2 lanes)"),
        ({"lanes": 0}, "lane"),
        ({"data": None}, "k: "),
        ({"ndim": -1}, "dim"),
        ({"device_type": 2}, "k is on the DLPack device (2, 0), not on the CPU"),
        ({"offset": 2**64 - 64}, "k: "),
        ({"version": (9, 0)}, "version"),
    ],
)
@pytest.mark.parametrize("gaps", [False, True])
def test_what_cannot_be_read_is_an_error_and_is_released_once(options, text, gaps):
    k = inputs()[1]
    array = np.repeat(k, 2, 2)[:, :, ::2] if gaps else k
    fields = dict(options)
    offset = fields.pop("offset", 0)
    producer = Producer(array, **fields)
    if offset:
        producer.fields["byte_offset"] = offset
    with pytest.raises((ValueError, RuntimeError), match=None) as error:
        scan(producer)
    assert text in str(error.value), error.value
    assert (producer.exported, producer.released) == (1, 1)


def test_an_error_of_the_operator_releases_the_arrays():
    q, k, v = (Producer(array) for array in inputs())
    with pytest.raises(ValueError, match="differ in batch or head_dim"):
        gd._native.scan({"q": q, "k": v, "beta": np.full(2, 0.5, np.float32)}, gd.Mask.none(), {})
    with pytest.raises(ValueError, match="gradient of w was asked for"):
        gd._native.select({"q": q, "k": k, "v": v}, ["w"], {})
    with pytest.raises(ValueError, match="beta is missing"):
        gd._native.scan({"q": q, "k": k}, gd.Mask.none(), {})
    assert [p.exported for p in (q, k, v)] == [p.released for p in (q, k, v)] == [3, 2, 2]


def test_a_capsule_is_consumed_once():
    producer = Producer(inputs()[1], same_capsule=True)
    scan(producer)
    with pytest.raises(ValueError, match="already been consumed"):
        scan(producer)
    assert (producer.exported, producer.released) == (1, 1)


def test_gradients_hold_the_arrays_until_they_are_gone():
    q, k, v = inputs()
    found = gd.scan(q, k, beta=0.5, candidates=2)
    arrays = [Producer(array) for array in (q, k, v)]
    options = {"beta": np.full(2, 0.5, np.float32), "index": found.index, "energy": found.energy}
    given = dict(zip("qkv", arrays, strict=True)) | options
    outputs, gradients = gd._native.select(given, ["q", "k", "v"], {})
    assert [p.released for p in arrays] == [0, 0, 0]
    dy = Producer(np.ones((1, 2, 3, 4), np.float32))
    dv = np.from_dlpack(gradients.backward({"y": dy})["v"])
    assert dv.sum() == 24 and dy.released == 1
    del gradients
    assert [p.released for p in arrays] == [1, 1, 1]
    # What was returned does not lie in the memory of the arguments.
    y = np.from_dlpack(outputs["y"])
    before = y.copy()
    v[:] = 0
    assert np.array_equal(y, before) and before.any()


def test_empty_arrays_are_read_and_refused_by_the_operator():
    q, k, v = inputs()
    for dtype in (np.float32, np.float64):
        with pytest.raises(ValueError, match=r"q \[1, 2, 0, 8\] is empty"):
            gd.scan(q[:, :, :0].astype(dtype), k.astype(dtype), beta=0.5, candidates=2)
    empty = Producer(k[:, :, :0], data=None)
    with pytest.raises(ValueError, match=r"k \[1, 2, 0, 8\] is empty"):
        gd.scan(q, empty, beta=0.5, candidates=2)
    assert empty.released == 1


def test_repeated_elements_beyond_all_memory_are_an_error():
    q, _, _ = inputs()
    huge = np.broadcast_to(np.float32(1), (1, 2, 1 << 46, 8))
    with pytest.raises(ValueError, match="k: no memory for a copy of"):
        gd.scan(q, huge, beta=0.5, candidates=2)


def test_arrays_that_numpy_does_not_export_name_the_argument():
    q, k, _ = inputs()
    for other in (k.astype(">f4"), np.full(k.shape, "x")):
        with pytest.raises(ValueError, match="^k: "):
            gd.scan(q, other, beta=0.5, candidates=2)
    misaligned = np.frombuffer(b"\0" + k.tobytes(), np.float32, offset=1).reshape(k.shape)
    with pytest.raises(ValueError, match="^k: .*align"):
        gd.scan(q, misaligned, beta=0.5, candidates=2)


def test_results_are_exported_any_number_of_times():
    found = gd._native.scan(dict(zip("qk", inputs()[:2], strict=True)) | {"beta": np.full(2, 0.5, np.float32)}, gd.Mask.none(), {})
    (results, _) = found
    first, second = (np.from_dlpack(results["index"]) for _ in range(2))
    assert np.shares_memory(first, second) and first.flags.writeable
    del results
    assert np.array_equal(first, second)
