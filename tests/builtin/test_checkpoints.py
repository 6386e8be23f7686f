"""Checkpoints are read in full, and nothing in them runs."""

from __future__ import annotations

import collections
import functools
import io
import os
import pickle
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dav_bench.builtin import unpickle
from dav_bench.builtin.checkpoints import fill, load_checkpoint, state_dict
from dav_bench.builtin.unpickle import Inert
from dav_bench.errors import DavBenchError, ExitCode

RAN: list[str] = []


def boom(*args: Any) -> str:
    RAN.append("boom")
    return "boom"


class Config:
    """Like a pickled configuration object: `weights_only` refuses it."""

    def __init__(self) -> None:
        self.lr = 3e-4

    def __setstate__(self, state: Any) -> None:
        boom()
        self.__dict__.update(state)


class Hostile:
    """Pickles to the call `call(*args)`, with a state that is set on the result."""

    def __init__(self, call: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (call, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


def archive(
    path: Path, data: bytes, members: dict[str, bytes] | None = None, how: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", how) as out:
        out.writestr("a/data.pkl", data)
        for name, content in (members or {}).items():
            out.writestr(f"a/{name}", content)
    return path


@pytest.fixture(autouse=True)
def nothing_ran() -> Any:
    RAN.clear()
    yield
    assert RAN == []


def test_reads_all_that_torch_saves(tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    content: dict[str, Any] = {
        "parameter": torch.nn.Parameter(x),
        "transposed": x.t(),
        "slice": x[1:, 2:4],
        "half": x.bfloat16(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "ids": torch.arange(7),
        "flags": torch.tensor([True, False]),
    }
    torch.save(content, tmp_path / "x.ckpt")
    read = load_checkpoint(tmp_path / "x.ckpt")
    for name, tensor in content.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach()), name
    assert type(read["parameter"]) is torch.Tensor


def test_containers_come_back_plain_and_classes_inert(tmp_path: Path) -> None:
    shared = [1, (2.5, None)]
    torch.save(
        {
            "ordered": collections.OrderedDict(a=1),
            "default": collections.defaultdict(list, {1: [2]}),
            "set": {1, 2},
            "pair": [shared, shared],
            "hyper_parameters": Config(),
            "device": torch.device("cpu"),
        },
        tmp_path / "x.ckpt",
    )
    RAN.clear()
    read = load_checkpoint(tmp_path / "x.ckpt")
    assert (type(read["ordered"]), read["ordered"]) == (dict, {"a": 1})
    assert (type(read["default"]), read["default"]) == (dict, {1: [2]})
    assert (type(read["set"]), read["set"]) == (set, {1, 2})
    assert read["pair"][0] is read["pair"][1] and read["pair"][0] == shared
    assert isinstance(read["hyper_parameters"], Inert)
    assert read["hyper_parameters"].state == {"lr": 3e-4}
    assert repr(read["device"]) == "<torch.device, not loaded>"


def test_what_is_written_to_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(3)}, tmp_path / "x.ckpt")
    load_checkpoint(tmp_path / "x.ckpt")["x"].add_(1)
    assert load_checkpoint(tmp_path / "x.ckpt")["x"].sum() == 0


HOSTILE = [
    Hostile(boom),
    Hostile(os.system, "exit 1"),
    Hostile(eval, "RAN.append('eval')"),
    Hostile(exec, "import os"),
    Hostile(__import__, "os"),
    Hostile(functools.partial, boom),
    Hostile(torch.hub.load, "somewhere/else", "model"),
    Hostile(torch.load, "other.pt"),
    Hostile(
        torch._utils._rebuild_wrapper_subclass, Config, torch.float32, (1,), (1,), 0, "strided", "cpu", False
    ),
    Hostile(torch._tensor._rebuild_from_type_v2, boom, Config, (), {}),
    Hostile(collections.OrderedDict, state={"keys": Hostile(boom)}),
    Hostile(Config, state=({}, {"__class__": Hostile(boom)})),
    Hostile(pickle.loads, pickle.dumps(Hostile(boom))),
]


@pytest.mark.parametrize(
    "attack", HOSTILE, ids=lambda a: str(getattr(a.reduced[0], "__name__", a.reduced[0]))
)
def test_nothing_a_pickle_names_is_called(tmp_path: Path, attack: Hostile) -> None:
    # protocol 2, as torch writes it: modules are named, nothing is called at dump time
    path = archive(tmp_path / "x.ckpt", pickle.dumps({"payload": attack, "after": [1]}, protocol=2))
    before = set(sys.modules)
    read = load_checkpoint(path)
    assert read["after"] == [1]
    assert isinstance(read["payload"], Inert | dict)
    assert all(name.startswith("encodings.") for name in set(sys.modules) - before)  # zipfile loads one


def test_names_are_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap_module.py").write_text("import tests_do_not_import_this\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = archive(tmp_path / "x.ckpt", b"\x80\x02}U\x01actrap_module\nThing\n)\x81s.")
    assert repr(load_checkpoint(path)["a"]) == "<trap_module.Thing, not loaded>"
    assert "trap_module" not in sys.modules


REFUSED = {
    "call of what a call returned": b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n\x86RU\x02hi\x85R.",
    "call of a placeholder object": b"\x80\x02cos\nsystem\n)R)R.",
    "state on a class": b"\x80\x02cbuiltins\nobject\nN}U\x03fooK\x01s\x86b.",
    "state on the tensor builder": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x07__new__K\x01s\x86b.",
    "state on the container class": b"\x80\x02ccollections\nOrderedDict\nN}U\x05itemsK\x01s\x86b.",
    "persistent id that is no storage": b"\x80\x02U\x04moduQ.",
    "persistent id as text": b"P/etc/passwd\n.",
    "extension code": b"\x80\x02\x82\x01.",
    "endless nesting": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "no stop": b"\x80\x02}",
    "memory for a billion objects": b"\x80\x02}r\x00\x00\x00\x7f.",
    "a buffer of a terabyte": b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(tmp_path: Path, name: str) -> None:
    with pytest.raises(DavBenchError, match="Cannot read the model"):
        load_checkpoint(archive(tmp_path / "x.ckpt", REFUSED[name]), "model")
    assert not hasattr(Inert, "foo")


def test_one_file_cannot_reach_the_next(tmp_path: Path) -> None:
    first, second = (unpickle._Unpickler(io.BytesIO(), None) for _ in range(2))  # type: ignore[arg-type]
    assert first.find_class("os", "system") is first.find_class("os", "system")
    assert first.find_class("os", "system") is not second.find_class("os", "system")
    with pytest.raises(pickle.UnpicklingError):
        first.find_class("os", "system").type_name = "mine"


STORAGE = object()


def storage_pickle(key: str, count: int, *tensor: Any) -> bytes:
    """The pickle of one tensor (storage, offset, size, stride) with the given persistent id."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", count) if obj is STORAGE else None

    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"x": Hostile(torch._utils._rebuild_tensor_v2, STORAGE, *tensor)})
    return out.getvalue()


@pytest.mark.parametrize(
    ("key", "count", "tensor"),
    [
        ("0", 4, (0, (5,), (1,))),
        ("0", 4, (1, (4,), (1,))),
        ("0", 4, (-1, (4,), (1,))),
        ("0", 4, (0, (2,), (-1,))),
        ("0", 4, (0, (1 << 40,), (0,))),
        ("0", 1 << 40, (0, (4,), (1,))),
        ("0", 3, (0, (3,), (1,))),
        ("1", 4, (0, (4,), (1,))),
        ("../../etc/passwd", 4, (0, (4,), (1,))),
    ],
)
def test_a_tensor_stays_in_its_storage(tmp_path: Path, key: str, count: int, tensor: tuple[Any, ...]) -> None:
    members = {"data/0": torch.arange(4.0).numpy().tobytes()}
    good = load_checkpoint(archive(tmp_path / "g.ckpt", storage_pickle("0", 4, 0, (4,), (1,)), members))
    assert good["x"].tolist() == [0, 1, 2, 3]
    with pytest.raises(DavBenchError, match="Cannot read"):
        load_checkpoint(archive(tmp_path / "x.ckpt", storage_pickle(key, count, *tensor), members))


def test_refuses_compressed_members_and_other_formats(tmp_path: Path) -> None:
    with pytest.raises(DavBenchError, match="compressed"):
        load_checkpoint(archive(tmp_path / "x.ckpt", pickle.dumps({}), how=zipfile.ZIP_DEFLATED))
    torch.save({"a": 1}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DavBenchError, match="zip format"):
        load_checkpoint(tmp_path / "legacy.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Hostile(boom)))
    with pytest.raises(DavBenchError, match="zip format"):
        load_checkpoint(tmp_path / "plain.pkl")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(DavBenchError, match="not a dictionary"):
        load_checkpoint(tmp_path / "list.pt")


def test_a_damaged_file_is_refused_or_read_but_never_crashes(tmp_path: Path) -> None:
    torch.save({"x": torch.arange(6.0), "more": {"a": [1, (2,)]}}, tmp_path / "good.ckpt")
    whole, chance = (tmp_path / "good.ckpt").read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        (tmp_path / "x.ckpt").write_bytes(damaged[: chance.choice([len(whole), len(whole) // 2])])
        try:
            load_checkpoint(tmp_path / "x.ckpt")
        except DavBenchError:
            refused += 1
    assert 150 <= refused < 300


def test_a_missing_file_says_what_and_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DavBenchError) as caught:
        load_checkpoint(tmp_path / "none.ckpt", "reward oracle", "download it")
    assert caught.value.code == ExitCode.MISSING
    assert "reward oracle" in str(caught.value) and "Try: download it" in str(caught.value)


def test_state_dict_and_fill(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    torch.save({"state_dict": {f"model.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "x.ckpt")
    tensors = state_dict(load_checkpoint(tmp_path / "x.ckpt"), "model.")
    other = torch.nn.Linear(3, 2)
    fill(other, tensors, "network")
    assert torch.equal(other.weight, net.weight)
    with pytest.raises(DavBenchError, match="not the network") as caught:
        fill(torch.nn.Linear(4, 2, bias=False), {**tensors, "odd": tensors["bias"]}, "network")
    assert "keys that do not belong: bias, odd" in str(caught.value)
    assert "weight (2, 3) for (2, 4)" in str(caught.value)
