"""What a server sends is read as data: a pickle that asks for anything to be called is refused, and calls nothing."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import os
import pickle
import pickletools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import dill
import numpy as np
import pytest

from deephyper_balsam.errors import BalsamError
from deephyper_balsam.store import trial_rows, values
from deephyper_balsam.store.encoding import pack, unpack, unpack_error
from deephyper_balsam.trial import TrialState

PLAIN: list[Any] = [
    {"x": 1.5, "name": "a'b\n", "flag": True, "none": None, "big": 2**70, "nested": [1, (2, {"ü": b"\x00\xff"})]},
    {1, 2},
    frozenset({"a"}),
    bytearray(b"x"),
    complex(1, -2),
    float("inf"),
]
NUMBERS = [np.float64(1.5), np.float32(0.1), np.int64(-3), np.uint8(7), np.bool_(True), np.str_("ü"), np.bytes_(b"a")]


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def encode(value: Any, protocol: int) -> str:
    return base64.b64encode(pickle.dumps(value, protocol)).decode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_and_numbers_of_numpy_survive(protocol: int) -> None:
    for value in [*PLAIN, *NUMBERS, {"all": NUMBERS}]:
        found = unpack(encode(value, protocol))
        assert found == value
        assert type(found) is type(value)
    assert unpack(pack(PLAIN[0])) == PLAIN[0]
    assert unpack(base64.b64encode(dill.dumps({"a": NUMBERS}, recurse=True)).decode()) == {"a": NUMBERS}


def attacks(mark: Path) -> list[Any]:
    touch = f"touch {mark}"
    return [
        Call(os.system, touch),
        Call(subprocess.check_output, ["touch", str(mark)]),
        Call(eval, f"open({str(mark)!r}, 'w')"),
        Call(exec, f"open({str(mark)!r}, 'w')"),
        Call(getattr, os, "system"),
        Call(dill.loads, dill.dumps(Call(os.system, touch))),
        Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        Call(np.dtype, "O8"),
        Call(open, str(mark), "w"),
        Path("/"),
        decimal.Decimal("1"),
        datetime.datetime(2020, 1, 1),
        np.zeros(3),
        np.datetime64("2020-01-01"),
        ValueError("x"),
        lambda: None,
    ]


def test_no_pickle_calls_anything(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for attack in attacks(mark):
        for value in (attack, {"objective": attack}, [1, (attack,)]):
            text = base64.b64encode(dill.dumps(value)).decode()
            with pytest.raises(BalsamError, match="cannot be decoded"):
                unpack(text)
            for row in ({"serialized_return_value": text}, {"serialized_exception": text}):
                job = {"id": 1, "state": "JOB_FINISHED", "workdir": "s/1", "data": {}, "tags": {"trial": "1"}, **row}
                assert trial_rows.read_outcome(job)["objective"] is None
                assert trial_rows.read_state(job) is TrialState.FAILED
            assert not mark.exists(), attack


@pytest.mark.parametrize(
    "raw", [b"", b"\x80", b"garbage", b"cos\nsystem\n(S'true'\ntR.", b"(lp0\n" * 50_000, b"\x80\x04\x95" + b"\xff" * 8]
)
def test_what_is_damaged_is_told(raw: bytes) -> None:
    for read in (unpack, unpack_error):
        with pytest.raises(BalsamError, match="cannot be decoded"):
            read(base64.b64encode(raw).decode())
    with pytest.raises(BalsamError, match="cannot be decoded"):
        unpack("no base64 ü")


class OwnError(Exception):
    pass


def test_an_exception_is_told_without_being_made(tmp_path: Path) -> None:
    from balsam.schemas import serialize_exception

    for error, said in (
        (ImportError("No module named 'x'", name="x"), "ImportError: No module named 'x'"),
        (OSError(2, "No such file"), "FileNotFoundError: 2, No such file"),
        (OwnError(), "OwnError"),
        (KeyError("k"), "KeyError: k"),
    ):
        with pytest.raises(type(error)) as caught:
            raise error
        assert unpack_error(serialize_exception(caught.value)) == said
    mark = tmp_path / "mark"
    unpack_error(base64.b64encode(pickle.dumps((Call(os.system, f"touch {mark}"), None))).decode())
    assert not mark.exists()


@pytest.mark.parametrize("value", [7, [1, 2], {"a": 1}, "text", None, [("objective", 1)]])
def test_a_return_value_that_is_no_outcome_is_a_failure(value: Any) -> None:
    job = {"id": 1, "state": "JOB_FINISHED", "workdir": "s/1", "data": {}, "serialized_return_value": pack(value)}
    outcome = trial_rows.read_outcome(job)
    assert outcome["objective"] is None
    assert "no outcome" in outcome["failure"]


def forged(*parts: bytes) -> str:
    return base64.b64encode(b"\x80\x04" + b"".join(parts) + b".").decode()


def text_of(word: bytes) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word


def named(module: bytes, name: bytes) -> bytes:
    return text_of(module) + text_of(name) + b"\x93"


NESTED = b")" + b"\x85" * 200_000
"""A tuple in a tuple in a tuple: its hash recurses."""
TWICE = b")" + b"2\x86" * 60
"""A tuple that holds a tuple twice that holds one twice: its hash, or whoever goes through it, takes 2**60 steps."""
READERS = {b"encode": b"_codecs", b"bytes": b"builtins", b"set": b"builtins", b"scalar": b"numpy.core.multiarray"}
FORGED = {
    "a nested key": forged(b"}", NESTED, b"Ns"),
    "a nested key of many": forged(b"}(", NESTED, b"Nu"),
    "a nested key in a dict of old": forged(b"(", NESTED, b"Nd"),
    "a nested member": forged(b"\x8f(", NESTED, b"\x90"),
    "a nested member of a frozen set": forged(b"(", NESTED, b"\x91"),
    "a nested member of a called set": forged(named(b"builtins", b"set"), b"](", NESTED, b"e\x85R"),
    "a key without end": forged(b"}", TWICE, b"Ns"),
    "a value without end": forged(TWICE),
    "lists without end": forged(b"]", b"\x94](h\x00h\x00e" + b"".join(b"\x94](h%ch%ce" % (n, n) for n in range(1, 60))),
    "a list in itself": forged(b"]\x94h\x00a"),
    "an index of a memo": forged(b"Nr\xff\xff\xff\x7f0", NESTED),
    "an index of a memo in words": forged(b"Np999999999999\n0", NESTED),
    "a length of text": forged(b"\x8d", (2**40).to_bytes(8, "little")),
    "a length of bytes": forged(b"\x8e", (2**40).to_bytes(8, "little")),
    "a length of a bytearray": forged(b"\x96", (2**40).to_bytes(8, "little")),
    "a length of a frame": forged(b"\x95", (2**40).to_bytes(8, "little")),
    "a long integer": forged(b"\x8b\xff\xff\xff\x7f"),
    "a number of bytes": forged(named(b"builtins", b"bytearray"), b"J\xff\xff\xff\x7f\x85R"),
    "the same bytes again and again": forged(
        *(b"B", (10**6).to_bytes(4, "little"), b"x" * 10**6, b"\x940"),
        *(named(b"builtins", b"bytearray"), b"\x940(", b"h\x01h\x00\x85R" * 100_000, b"l"),
    ),
    "large keys again and again": forged(
        b"\x8b", (10**6).to_bytes(4, "little"), b"x" * 10**6, b"\x940}(", b"h\x00N" * 300_000, b"u"
    ),
    "keys of one hash": forged(
        *(b"}(", *(b"\x8a\x0c" + ((2**61 - 1) * (n + 2**33)).to_bytes(12, "little") + b"N" for n in range(10**5)), b"u")
    ),
    "an instruction for a copy": forged(b"\x82\x01"),
    "a function": forged(named(b"_codecs", b"encode")),
    **{
        f"{kind} of {name.decode()}": forged(named(module, name), state, b"b")
        for name, module in READERS.items()
        for kind, state in {"a state": b"}\x8c\x01xNs", "slots": b"N}\x8c\x08__name__\x8c\x01xs\x86"}.items()
    },
}


def bounded(texts: list[str], *, seconds: int = 60, megabytes: int = 400) -> list[str]:
    """Read each text in a process that may take so much and no more; return what came of each."""
    code = (
        "import resource, sys, json, numpy\n"
        "from deephyper_balsam.store import values\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (taken + {megabytes} * 2**20,) * 2)\n"
        f"resource.setrlimit(resource.RLIMIT_CPU, ({seconds},) * 2)\n"
        "for text in json.load(sys.stdin):\n"
        "    for read in (values.read, values.describe_error):\n"
        "        try:\n"
        "            said = type(read(text)).__name__\n"
        "        except values.NotPlainError as error:\n"
        "            said = 'MemoryError' if isinstance(error.__cause__, MemoryError) else 'refused'\n"
        "        print(said, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(texts), capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stdout[-300:], done.stderr[-3000:])
    return done.stdout.split()


def test_a_forged_pickle_is_refused_within_bounded_memory_and_time() -> None:
    said = bounded(list(FORGED.values()))[::2]
    assert dict(zip(FORGED, said, strict=True)) == dict.fromkeys(FORGED, "refused")


def test_nothing_but_a_value_or_a_refusal_comes_of_any_bytes() -> None:
    draw = random.Random(0)
    seeds = [base64.b64decode(text) for text in FORGED.values() if len(text) < 2000]
    seeds += [pickle.dumps(value, protocol) for value in [*PLAIN, NUMBERS] for protocol in range(6)]
    codes = [op.code.encode("latin1") for op in pickletools.opcodes]
    drawn = []
    for _ in range(4000):
        raw = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(0, 5)):
            at = draw.randrange(len(raw) + 1)
            raw[at : at + draw.randint(0, 3)] = draw.choice(
                [draw.choice(codes), draw.randbytes(draw.randint(0, 4)), draw.choice(seeds)[:40], b"\xff" * 8]
            )
        drawn.append(bytes(raw))
    drawn += [b"\x80\x04" + b"".join(draw.choices(codes, k=30)) + b"." for _ in range(3000)]
    said = bounded([base64.b64encode(raw).decode() for raw in drawn], seconds=120)
    assert len(said) == 2 * len(drawn)
    assert "MemoryError" not in said
    assert len(said) - said.count("refused") > 200, "nearly all that was drawn was refused at once"


def test_reading_changes_none_of_what_reads() -> None:
    before = {name: dict(vars(part)) for name, part in vars(values).items() if hasattr(part, "__dict__")}
    for text in [text for name, text in FORGED.items() if name.startswith(("a state", "slots"))]:
        with pytest.raises(values.NotPlainError):
            values.read(text)
    assert {name: dict(vars(part)) for name, part in vars(values).items() if hasattr(part, "__dict__")} == before
