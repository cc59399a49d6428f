"""The automatic dtype: what a device multiplies natively, the caps, and the one warning that another dtype is slow."""

import logging

import pytest
import torch
from models import batches_for, make

import lorasb
from lorasb.utils import precision


@pytest.fixture(autouse=True)
def no_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*precision.CAPS, "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def silent_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not warned yet, on a CPU where torch's 16-bit products take forty times as long."""
    monkeypatch.setattr(precision, "_warned_dtypes", set())
    monkeypatch.setattr(precision, "slowdown", lambda dtype: 40.0)
    monkeypatch.setattr(precision, "native", lambda device="cpu": precision.Precision("float32", "a test"))


def processor(monkeypatch: pytest.MonkeyPatch, flags: str, machine: str = "x86_64", torchs: bool = True) -> None:
    monkeypatch.setattr(precision, "_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: torchs, raising=False)


@pytest.mark.parametrize(
    ("flags", "machine", "torchs", "want"),
    [
        ("sse2 avx2", "x86_64", True, "float32 AVX2"),
        ("avx2 avx512f", "x86_64", True, "float32 AVX-512"),
        ("avx2 avx512f avx512_bf16", "x86_64", True, "bfloat16 AVX-512 with bf16"),
        ("avx2 avx512f avx512_bf16", "x86_64", False, "float32 AVX-512 with bf16"),  # but torch does not use it
        ("avx2 avx512f amx_tile amx_bf16", "x86_64", True, "bfloat16 AMX"),
        ("avx2 avx512f avx512_bf16 amx_bf16", "x86_64", True, "bfloat16 AMX"),
        ("asimd bf16", "aarch64", False, "bfloat16 Arm with bf16"),
        ("asimd", "aarch64", False, "float32 Arm"),
        ("bf16", "x86_64", True, "float32 x86_64"),
        ("", "riscv64", True, "float32 riscv64"),
    ],
)
def test_a_processor(monkeypatch: pytest.MonkeyPatch, flags: str, machine: str, torchs: bool, want: str) -> None:
    processor(monkeypatch, flags, machine, torchs)
    found, (name, _, kind) = precision.native(), want.partition(" ")
    assert found.name == name
    assert found.dtype == getattr(torch, name)
    assert "bf" in found.reason
    assert precision.processor_class() == kind
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("LORASB_MAX_CPU_ISA", "avx2")
    assert precision.processor_class() == f"{kind}, ONEDNN_MAX_CPU_ISA=AVX2, LORASB_MAX_CPU_ISA=avx2"


@pytest.mark.parametrize(
    ("variable", "value", "want"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "float32"),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", "float32"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", "bfloat16"),
        ("ONEDNN_MAX_CPU_ISA", "ALL", "bfloat16"),
        ("DNNL_MAX_CPU_ISA", "AVX2", "float32"),
        ("ATEN_CPU_CAPABILITY", "avx2", "float32"),
        ("ATEN_CPU_CAPABILITY", "avx512", "bfloat16"),
    ],
)
def test_a_cap(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, want: str) -> None:
    processor(monkeypatch, "avx512_bf16")
    monkeypatch.setenv(variable, value)
    found = precision.native()
    assert found.name == want
    assert want == "bfloat16" or value.upper() in found.reason.upper()


@pytest.mark.parametrize(("capability", "want"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], want: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = precision.native("cuda")
    assert found.name == want
    assert f"sm_{capability[0]}{capability[1]}" in found.reason


def test_a_dtype_that_the_device_has_not_got(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> float:
        raise RuntimeError('"addmm" not implemented for Half\nmore')

    monkeypatch.setattr(precision, "_seconds", fail)
    with pytest.raises(ValueError, match=r"--dtype float16: this cpu cannot compute in it.*for Half.*--dtype auto"):
        precision.resolve("float16", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match="--dtype bfloat16: this cuda cannot compute in it"):
        precision.resolve("bfloat16", "cuda")


def test_the_ratio_is_one_of_times_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    precision.slowdown.cache_clear()
    assert 0 < precision.slowdown(torch.float32) < 21  # a loose bound: the machine may be busy, and of any speed
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("silent_before")
def test_the_line_comes_once_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lorasb"):
        first = lorasb.patch(make("llama", dtype=torch.bfloat16), r=4)
        lorasb.initialize(first, batches_for("llama"), lr=1e-2, progress=False)
        lorasb.patch(make("llama", dtype=torch.bfloat16), r=4)
    (line,) = (record.message for record in caplog.records if "float32" in record.message)
    assert line.startswith("bfloat16 on this CPU: torch takes 40x the time of float32")
    assert {p.dtype for p in first.get_base_model().parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.usefixtures("silent_before")
def test_where_there_is_nothing_to_say(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "slowdown", lambda dtype: pytest.fail("nothing is timed here"))
    with caplog.at_level(logging.WARNING, "lorasb"):
        lorasb.patch(make("llama"), r=4)
        with torch.device("meta"):
            lorasb.patch(make("llama", dtype=torch.bfloat16), r=4)
    monkeypatch.setattr(precision, "native", lambda device="cpu": precision.Precision("bfloat16", "a test"))
    precision.warn_if_slow(make("llama", dtype=torch.bfloat16))
    assert not [record for record in caplog.records if "float32" in record.message]
