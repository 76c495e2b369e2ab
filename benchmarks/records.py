# SPDX-License-Identifier: Apache-2.0
"""The JSON form: one record per provider and case, validated, rewritten atomically.

Checked by hand, not by a schema library: the GPU machines that write it have no network.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 1
PARITY = ("ok", "wrong", "none")
NUMBERS = ("median_s", "p20_s", "p80_s", "rounds", "ratio_to_torch", "share_of_bound", "cold_s")


@dataclass
class Record:
    """One provider on one case.

    Attributes:
        suite: "train", "infer", "step", "sample", "features" or "lm".
        provider: for example "gru_fast.cpu".
        version: of the package that provides it.
        device: "cpu" or "cuda".
        dtype: a name of `cases.DTYPES`; of a sampler that of its packed weights, also "int8".
        threads: CPU threads that every provider of the run was given.
        case: the sizes, as `cases.Case`.
        parity: "ok"; "wrong", then there is no number; "none" where it was not judged, or
            what is computed is something else (nn.LSTM, for scale).
        median_s: seconds per call over the rounds.
        p20_s: their 20th percentile.
        p80_s: their 80th percentile.
        rounds: how many.
        ratio_to_torch: nn.GRU's time over this one's, the median of the rounds' ratios; for resets
            and samplers that of the baseline named in `baseline`.
        baseline: the provider that the ratio is to.
        bound_s: the time that the machine allows at best.
        share_of_bound: bound_s / median_s.
        peak_bytes: memory beyond what was there before the call, at its highest.
        cold_s: the first call of these sizes, in a fresh process on the CPU.
        parity_T: time steps of the gate's call, where it was shorter.
        other_cpu: share of the machine's CPU time that others took meanwhile.
        exchange_s: of a run with several threads: how long a cache line took from core to core
            before the rounds or after them, whichever was longer.
        feature: the row of the features suite.
        dry: true where nothing was claimed: a CPU stood in for a GPU.
        error: why there is no number.
    """

    suite: str
    provider: str
    version: str
    device: str
    dtype: str
    threads: int
    case: dict[str, Any]
    parity: str = "none"
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    rounds: int | None = None
    ratio_to_torch: float | None = None
    baseline: str | None = None
    bound_s: float | None = None
    share_of_bound: float | None = None
    peak_bytes: int | None = None
    cold_s: float | None = None
    parity_T: int | None = None
    other_cpu: float | None = None
    exchange_s: float | None = None
    feature: str | None = None
    dry: bool = False
    error: str | None = None


@dataclass
class Results:
    """What a file holds.

    Attributes:
        machine: see `machine.describe`.
        records: of all suites.
        figures: named numbers of the machine: {"name", "value", "unit", ...}.
        notes: what was left out, and why.
        rows: of the GPU program, by name: "done", or what went wrong.
    """

    machine: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: dict[str, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether the run came to its end, and so said how long it took."""
        return "seconds" in self.machine

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "records": [_without_defaults(record) for record in self.records],
            "figures": self.figures,
            "notes": self.notes,
            "rows": self.rows,
        }

    def write(self, path: Path) -> None:
        """Replace the file in one go, so that a cut-off leaves the old or the new one."""
        data = self.as_dict()
        validate(data)
        write_json(path, data)


def _without_defaults(record: Record) -> dict[str, Any]:
    """The fields that say something; `read` fills in the others."""
    values = asdict(record)
    return {f.name: values[f.name] for f in fields(Record) if values[f.name] != f.default}


def write_json(path: Path, data: Any) -> None:
    """Replace the file in one go; NaN and infinity are refused."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump(data, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: Path) -> Results:
    """The file's contents.

    Raises:
        ValueError: it is not of this form; the message names the place.
    """
    data = json.loads(path.read_text())
    validate(data)
    records = [Record(**record) for record in data["records"]]
    return Results(data["machine"], records, data["figures"], data["notes"], data["rows"])


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "dict[str, Any]": (dict,),
    "None": (type(None),),
}


def _expect(condition: bool, place: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{place}: {message}")


def validate(data: Any) -> None:
    """Check what `read` relies on.

    Raises:
        ValueError: naming the first fault and its place.
    """
    _expect(isinstance(data, dict), "file", f"expected an object, got {type(data).__name__}")
    lists = dict.fromkeys(("records", "figures", "notes"), list)
    keys = {"schema": int, "machine": dict, **lists, "rows": dict}
    _expect(set(data) == set(keys), "file", f"expected keys {sorted(keys)}, got {sorted(data)}")
    for key, kind in keys.items():
        _expect(isinstance(data[key], kind), key, f"expected {kind.__name__}")
    _expect(data["schema"] == SCHEMA, "schema", f"expected {SCHEMA}, got {data['schema']}")
    for key in ("cpu", "versions", "commit"):
        _expect(key in data["machine"], "machine", f"{key} is missing")
    for number, record in enumerate(data["records"]):
        validate_record(record, f"records[{number}]")
    for number, figure in enumerate(data["figures"]):
        place = f"figures[{number}]"
        _expect(isinstance(figure, dict), place, "expected an object")
        missing = {"name", "value", "unit"} - set(figure)
        _expect(not missing, place, f"{sorted(missing)} missing")


def validate_record(record: Any, place: str = "record") -> None:
    """Check one record: fields, types, and that no number stands beside a red gate."""
    _expect(isinstance(record, dict), place, f"expected an object, got {type(record).__name__}")
    known = {f.name: f for f in fields(Record)}
    _expect(set(record) <= set(known), place, f"unknown {sorted(set(record) - set(known))}")
    for name, f in known.items():
        if name not in record:
            _expect(f.default is not MISSING, place, f"{name} is missing")
            continue
        value = record[name]
        kinds = tuple(t for part in str(f.type).split(" | ") for t in _TYPES[part])
        right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        _expect(right, f"{place}.{name}", f"expected {f.type}, got {value!r}")
        if isinstance(value, float):
            _expect(math.isfinite(value), f"{place}.{name}", f"expected a number, got {value}")
    _expect({"I", "H", "B", "T", "L", "V"} <= set(record["case"]), f"{place}.case", "sizes missing")
    given = {name for name in NUMBERS if record.get(name) is not None}
    parity = record.get("parity", "none")
    _expect(parity in PARITY, f"{place}.parity", f"expected one of {PARITY}, got {parity!r}")
    if parity == "wrong" or record.get("error"):
        _expect(not given, place, f"{sorted(given)} beside parity {parity!r} or an error")
    if record.get("dry"):
        claims = given & {"ratio_to_torch", "share_of_bound"}
        _expect(not claims, place, f"{sorted(claims)} in a dry run")
    if record.get("median_s") is not None:
        numbers = [record.get(name) for name in ("p20_s", "median_s", "p80_s")]
        complete = None not in numbers and record.get("rounds")
        _expect(bool(complete), place, "a median without p20_s, p80_s or rounds")
        ordered = 0 < numbers[0] <= numbers[1] <= numbers[2]
        _expect(ordered, place, f"expected 0 < p20_s <= median_s <= p80_s, got {numbers}")
