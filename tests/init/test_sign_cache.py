"""The cache: any rank and layers without a backward; mismatches are refused by field name; interrupted runs resume."""

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import layers
from gradients import factors
from models import batches_for, llama, make, started
from networks import Mixture, loss_of
from safetensors.torch import save
from tolerances import check_equal
from torch import nn
from torch.utils.data import DataLoader

import lorasb
from lorasb.init import cache as caches
from lorasb.init import pipeline, plan, strategies, write
from lorasb.init.task import InitOptions

LR = {"lr": 1e-3, "progress": False}
SINGLES = batches_for("llama", rows=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that was written at rank 4."""
    found = tmp_path_factory.mktemp("cache") / "signs.safetensors"
    started(batches=SINGLES, cache=found)
    return found


@pytest.fixture
def path(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished cache."""
    return Path(shutil.copy(finished, tmp_path))


@pytest.fixture
def no_backward(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_execute_plan", lambda *_: pytest.fail("a backward was run"))


@pytest.mark.parametrize("r", [2, 4, 16])
@pytest.mark.usefixtures("no_backward")
def test_another_rank_needs_no_backward(path: Path, r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    again, report = started(r=r, batches=SINGLES, cache=path)
    monkeypatch.undo()
    fresh, want = started(r=r, batches=SINGLES)
    check_equal(factors(again), factors(fresh))
    assert report.strategy == "cache"
    assert (report.loss, report.num_samples) == (want.loss, want.num_samples)
    for ours, theirs in zip(report.layers, want.layers, strict=True):
        assert ours.curve_sign == theirs.curve_sign
        assert ours.energy_grad == pytest.approx(theirs.energy_grad, abs=1e-3)  # the first pass had near ties
    assert again.peft_config["default"].init_provenance["data_sha256"]


@pytest.mark.usefixtures("no_backward")
def test_some_of_the_layers(path: Path) -> None:
    model = lorasb.patch(make("llama"), r=6, target_modules=["q_proj", "down_proj"])
    report = lorasb.initialize(model, SINGLES, cache=path, **LR)
    assert len(report.layers) == 4
    full, _ = started(r=6, batches=SINGLES, cache=path)
    assert all(torch.equal(value, factors(full)[name]) for name, value in factors(model).items())


@pytest.mark.usefixtures("no_backward")
def test_without_any_batches(path: Path) -> None:
    model, report = started(r=6, batches=None, cache=path)
    assert report.num_samples == 3
    with pytest.raises(ValueError, match=r"its seed is 0, expected 1"):
        lorasb.initialize(model, cache=path, seed=1, **LR)
    with pytest.raises(ValueError, match="stability compares halves of the samples, and a cache keeps their sum"):
        lorasb.initialize(model, cache=path, stability=True, **LR)


def test_more_layers_than_the_cache_has(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    lorasb.initialize(lorasb.patch(make("llama"), r=4, target_modules=["q_proj"]), SINGLES, cache=path, **LR)
    with pytest.raises(ValueError, match=r"has no layer 'model\.layers\.0\.self_attn\.k_proj' \(12 are missing\)"):
        started(batches=SINGLES, cache=path)


MISMATCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base weights": ({"seed": 1}, {}),
    "dtype": ({"dtype": torch.bfloat16}, {}),
    "data": ({}, {"batches": [*SINGLES[1:], SINGLES[1]]}),
    "seed": ({}, {"seed": 5}),
    "num_samples": ({}, {"num_samples": 2}),
    "loss_fn": ({}, {"loss_fn": lambda model, batch: model(**batch).loss}),
}


@pytest.mark.parametrize("field", MISMATCHES)
def test_a_mismatch_is_refused_by_name_and_changes_nothing(path: Path, field: str) -> None:
    of_base, options = MISMATCHES[field]
    model, content = lorasb.patch(make("llama", **of_base), r=4), path.read_bytes()
    expected = rf"the cache .*signs\.safetensors does not fit: its {field} is .*, expected .*Choose another"
    with pytest.raises(ValueError, match=expected):
        lorasb.initialize(model, **({"batches": SINGLES, "cache": path} | LR | options))
    assert not any(value.any() for value in factors(model).values())
    assert path.read_bytes() == content


def test_every_field_that_differs_alone_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, key, _ = caches.read(path)
    assert set(key) == {"base weights", "dtype", "update", "seed", "num_samples", "data", "loss_fn", "versions"}
    for field in key:
        cache = caches.Cache(path, key | {field: "other"})
        with pytest.raises(ValueError, match=rf'does not fit: its {field} is .*, expected "other"'):
            cache.load([])


def weighted(share: float, model: nn.Module | None = None) -> Any:
    return lambda _, batch: (share, model, batch)


@pytest.mark.parametrize(
    ("loss_fn", "name"),
    [
        (None, None),
        (loss_of, "loss_of"),
        (partial(loss_of, share=1), 'loss_of with {"share": 1}'),
        (nn.MSELoss(), 'MSELoss with {"reduction": "mean"}'),
    ],
)
def test_a_loss_counts_by_its_name_and_its_values(loss_fn: Any, name: str | None) -> None:
    model = lorasb.patch(make("llama"), r=4)
    assert caches.cache_key(model, layers(model), InitOptions(loss_fn=loss_fn), 3, "0")["loss_fn"] == name


def test_losses_of_one_name_and_other_values_are_others() -> None:
    named = [
        caches._describe_loss(loss) for loss in (weighted(0.1), weighted(0.5), weighted(0.5), weighted(0.5, nn.ReLU()))
    ]
    assert len(set(named)) == 3
    assert named[1] == named[2]
    assert named[3].endswith('with {"model": "ReLU", "share": 0.5}')
    of_one_function = (
        lambda model, batch: model(**batch).loss,
        lambda model, batch: model(**batch).loss.square(),
    )
    assert len(set(map(caches._describe_loss, of_one_function))) == 2
    assert (
        caches._describe_loss(partial(loss_of, {(0, 1): 0.5, "a": 1}, share=2))
        == 'loss_of with {"0": "dict", "share": 2}'
    )


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated or damaged": lambda content: content[:-7],
    "is no cache of": lambda _: save({"words": torch.zeros(4, 1)}),
    "is not a safetensors file": lambda _: b"signs",
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_and_other_files(path: Path, message: str) -> None:
    path.write_bytes(DAMAGE[message](path.read_bytes()))
    model = lorasb.patch(make("llama"), r=4)
    with pytest.raises(ValueError, match=message):
        lorasb.initialize(model, SINGLES, cache=path, **LR)
    assert not any(value.any() for value in factors(model).values())


def cut_off(model: nn.Module, path: Path, after: int) -> None:
    """Run an initialization, and interrupt it once `after` layers are factored."""
    plain, count = write.factor, itertools.count()

    def factor(*arguments: object) -> object:
        if next(count) == after:
            raise KeyboardInterrupt
        return plain(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "factor", factor)
        with pytest.raises(KeyboardInterrupt):
            lorasb.initialize(model, SINGLES, cache=path, **LR)


@pytest.fixture
def cut(tmp_path: Path) -> tuple[nn.Module, Path, Path]:
    """A model whose run was interrupted in its second block, its cache's path, and the partial cache it left."""
    path, model = tmp_path / "signs.safetensors", lorasb.patch(make("llama"), r=4)
    cut_off(model, path, after=9)
    return model, path, tmp_path / "signs.safetensors.partial"


def test_an_interrupted_run_resumes(cut: tuple[nn.Module, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, path, partial = cut
    assert not path.exists()
    assert not any(value.any() for value in factors(model).values())
    left = sorted(file.name for file in partial.iterdir())
    assert left == ["block-00001.safetensors", "boundary.safetensors", "key.json"]
    differentiated: list[object] = []
    plain = strategies.block_sums
    monkeypatch.setattr(strategies, "block_sums", lambda *args: differentiated.append(args[2]) or plain(*args))
    resumed = lorasb.initialize(model, SINGLES, cache=path, **LR)
    assert differentiated == [0]
    monkeypatch.undo()
    fresh, want = started(batches=SINGLES)
    check_equal(factors(model), factors(fresh))
    assert [layer.name for layer in resumed.layers] == [layer.name for layer in want.layers]
    assert resumed.loss == want.loss
    assert path.exists()
    assert not partial.exists()


def test_another_run_does_not_go_on_from_it(cut: tuple[nn.Module, Path, Path]) -> None:
    model, path, partial = cut
    with pytest.raises(ValueError, match=r"signs\.safetensors\.partial does not fit: its num_samples is 3, expected 2"):
        lorasb.initialize(model, SINGLES[1:], cache=path, **LR)
    assert json.loads((partial / "key.json").read_text())["seed"] == 0
    assert not any(value.any() for value in factors(model).values())
    assert not any(layer.is_initialized("default") for layer in layers(model).values())


def test_nor_does_a_run_with_other_targets(tmp_path: Path) -> None:
    path = tmp_path / "signs.safetensors"
    few = lorasb.patch(make("llama"), r=4, target_modules=["q_proj"])
    cut_off(few, path, after=1)
    more = lorasb.patch(make("llama"), r=4, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="its blocks and targets is"):
        lorasb.initialize(more, SINGLES, cache=path, **LR)
    lorasb.initialize(few, SINGLES, cache=path, **LR)
    assert not (tmp_path / "signs.safetensors.partial").exists()


@pytest.mark.parametrize("damaged", ["boundary", "block-00001"])
@pytest.mark.parametrize("kept", [-5, None])
def test_a_truncated_or_missing_file(cut: tuple[nn.Module, Path, Path], damaged: str, kept: int | None) -> None:
    model, path, partial = cut
    file = partial / f"{damaged}.safetensors"
    data = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(data[:kept])
    elif damaged == "boundary":  # the run begins again
        lorasb.initialize(model, SINGLES, cache=path, **LR)
        return check_equal(factors(model), factors(started(batches=SINGLES)[0]))
    message = r"is truncated or damaged.*" if kept is not None else r"expected block-00001.* found none"
    with pytest.raises(ValueError, match=rf"cannot be used \(.*{message}\): delete .*\.partial to make it again"):
        lorasb.initialize(model, SINGLES, cache=path, **LR)
    assert not any(value.any() for value in factors(model).values())
    return None


def test_experts_that_were_not_reached_are_known_to_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "signs.safetensors"
    batches = [{"x": torch.randn(2, 40), "labels": torch.randn(2)}]
    for strategy in ("layerwise", "cache"):
        model = lorasb.patch(Mixture(), r=3, target_modules=r"layers\.\d+\.experts\.\d+")
        with pytest.warns(UserWarning, match="4 layers were not reached"):
            report = lorasb.initialize(model, batches, cache=path, loss_fn=loss_of, **LR)
        assert report.strategy == strategy
        assert sum(layer.fallback == "weight" for layer in report.layers) == 4


def test_accumulate_makes_the_same_cache(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    started(batches=SINGLES, strategy="accumulate", cache=other)
    mine, theirs = (caches.read(file)[0] for file in (path, other))
    check_equal(*({name: layer.bits.words for name, layer in found.items()} for found in (mine, theirs)))
    assert all(layer.bits.nonzero is None for layer in mine.values())  # one bit per weight


def test_zeros_of_a_gradient_stay_zeros(tmp_path: Path) -> None:
    """A dead input feature gives a column of exact zeros: the nonzero plane is stored, cached and used."""
    x, linear = torch.randn(4, 40), nn.Linear(40, 40)
    x[:, 7] = 0.0
    loader = DataLoader([{"x": row} for row in x], batch_size=2)
    options = {"cache": tmp_path / "dead.safetensors", "loss_fn": lambda m, batch: (m(batch["x"]) - 1).square().mean()}
    reports = []
    for _ in range(2):
        model = lorasb.patch(nn.Sequential(copy.deepcopy(linear)), r=2, target_modules=["0"])
        reports.append(lorasb.initialize(model, loader, **options, **LR))
        assert reports[-1].layers[0].zeros == 40
        assert not layers(model)["0"].lorasb_A["default"][:, 7].any()
    assert reports[1].strategy == "cache"


def test_a_run_resumes_with_as_many_uncut_blocks_as_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory and rank may have changed since. A smaller model is refused because its base weights differ."""
    path = tmp_path / "signs.safetensors"
    torch.manual_seed(0)
    deep = llama(num_hidden_layers=6).eval()
    monkeypatch.setattr(plan, "uncut_blocks", lambda *_: 2)
    cut_off(lorasb.patch(copy.deepcopy(deep), r=4), path, after=23)
    monkeypatch.setattr(plan, "uncut_blocks", lambda *_: 0)
    with pytest.raises(ValueError, match=r"signs\.safetensors\.partial does not fit: its base weights is"):
        started(batches=SINGLES, cache=path)
    resumed = lorasb.patch(copy.deepcopy(deep), r=6)
    report = lorasb.initialize(resumed, SINGLES, cache=path, **LR)
    assert report.strategy == "layerwise"
    fresh = lorasb.patch(deep, r=6)
    lorasb.initialize(fresh, SINGLES, **LR)
    check_equal(factors(resumed), factors(fresh))
