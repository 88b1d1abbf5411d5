"""Images and sound: pixels, patches and learned tokens as leaves, where a model reads no text.

Hugging Face computes ViT's softmax in float32, so those ledgers close to 1e-6; those of speech
models close to 1e-9.
"""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from rich.console import Console

import lenslrp
from lenslrp import media
from lenslrp.hooks import AlphaBeta, Gamma, assignment, leaf_modules
from lenslrp.hooks import components as hook_components
from lenslrp.hooks.leaf_modules import media_embedders
from lenslrp.hooks.sites import Accounts, Site
from lenslrp.hooks.structure import components
from lenslrp.targets import Activation, Contrastive, Custom, Logit, LogitDiff, LogProb
from tests.conformance import zoo
from tests.conformance.families import COMPOSITES
from tests.unit.tiny import changes, snapshot

IMAGES = ("ViTForImageClassification", "DeiTForImageClassification", "ViTModel", "DeiTModel")
SPEECH = ("HubertForCTC", "HubertModel", "Wav2Vec2ForCTC", "Wav2Vec2Model")
NAMES = (*IMAGES, "ASTForAudioClassification", *SPEECH)
TABLES: dict[str, Any] = {
    **COMPOSITES,
    "AttnLRPViT": lenslrp.AttnLRPViT,
    "alpha-beta": lambda: {"linear": AlphaBeta(2.0, 1.0), "convolution": AlphaBeta(2.0, 1.0)},
    "gamma": lambda: {role: Gamma(0.25) for role in ("linear", "projection", "convolution")},
}

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return zoo.build(request.param)


def models(*names: str) -> Any:
    """Parametrise the module-wide model: one build a name."""
    return pytest.mark.parametrize("model", names, indirect=True)


def target_of(model: Any) -> Any:
    """A class, or a unit of the last residual where the model has no head."""
    return 1 if media.head_of(model) else Activation(zoo.last_residual(model), 5, 0)


def explain(model: Any, composite: Any = None, **options: Any) -> tuple[torch.Tensor, Any]:
    given = {"target": target_of(model), "names_filter": [], **media.example(model, batch=2)}
    return lenslrp.run_with_relevance(model, composite=composite, **{**given, **options})


def is_residual(hook: str) -> bool:
    return hook.endswith(("hook_resid_pre", "hook_resid_mid", "hook_resid_post"))


def tolerance(model: Any) -> float:
    return zoo.tolerance(type(model.original_model).__name__)


def given_at(cache: Any) -> torch.Tensor:
    (relevance,) = cache.inputs.values()
    return relevance


# ------------------------------------------------------------------- the promises


@models(*NAMES)
@pytest.mark.parametrize("composite", list(TABLES))
@pytest.mark.parametrize("leaves", media.LEAVES)
def test_the_ledger_balances(model: Any, composite: str, leaves: str) -> None:
    _, cache = explain(model, TABLES[composite](), leaves=leaves)
    ledger = cache.ledger()
    assert abs(ledger.error) <= 5 * tolerance(model), str(ledger)
    at_leaves = float(cache.tokens.sum()) if leaves == "patches" else float(given_at(cache).sum())
    if cache.positions is not None:
        at_leaves += float(cache.positions.sum())
    if leaves == "pixels" and cache.special is not None:
        at_leaves += float(cache.special.sum())
    assert at_leaves == pytest.approx(ledger.leaves, rel=1e-9, abs=1e-9)


@models(*NAMES)
def test_cp_conserves_at_pixels_patches_and_every_residual(model: Any) -> None:
    bare = zoo.build(type(model.original_model).__name__, bias=False)
    _, cache = explain(bare, lenslrp.CPLRP(), names_filter=is_residual)
    target = float(cache.target.value.sum())
    near = 10 * tolerance(model) * max(1.0, abs(target))
    learned = sum(
        float(part.sum()) for part in (cache.special, cache.positions) if part is not None
    )
    positions = 0.0 if cache.positions is None else float(cache.positions.sum())
    assert cache.ledger().biases == 0
    assert abs(float(given_at(cache).sum()) + learned - target) <= near
    assert abs(float(cache.tokens.sum()) + positions - target) <= near
    assert len(cache.keys()) >= zoo.LAYERS
    for hook in cache:
        if not hook.startswith(zoo.last_residual(model)) or media.head_of(model):
            assert abs(float(cache[hook].sum()) - target) <= near, hook


@models(*NAMES)
def test_both_choices_of_leaves_agree_on_tokens_and_positions(model: Any) -> None:
    for composite in (lenslrp.AttnLRP(), lenslrp.AttnLRPViT()):
        _, above = explain(model, composite, leaves="patches")
        _, below = explain(model, composite, leaves="pixels")
        torch.testing.assert_close(above.tokens, below.tokens, rtol=1e-9, atol=1e-12)
        assert above.inputs == {}
        if above.positions is not None:
            torch.testing.assert_close(above.positions, below.positions, rtol=1e-9, atol=1e-12)
            assert above.positions.shape == above.tokens.shape
            assert float(above.positions.abs().min(dim=1).values.max()) > 0


@models("ViTForImageClassification")
@pytest.mark.parametrize("composite", ["AttnLRP", "AttnLRPViT", "alpha-beta"])
def test_pixels_of_a_patch_have_its_relevance(model: Any, composite: str) -> None:
    """Without a bias every patch hands all of its relevance to its own pixels."""
    bare = zoo.build("ViTForImageClassification", bias=False)
    _, cache = explain(bare, TABLES[composite]())
    size = zoo.IMAGE["patch_size"]
    pixels = cache.pixels.sum(dim=1).unfold(1, size, size).unfold(2, size, size).sum(dim=(-1, -2))
    torch.testing.assert_close(pixels, cache.patches, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cache.tokens[:, 1:], cache.patches.flatten(1))
    torch.testing.assert_close(cache.tokens[:, :1], cache.special)
    assert cache.str_tokens[0] == ["[CLS]", "0,0", "0,1", "1,0", "1,1"]


@models(*NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_forward_pass_is_untouched(model: Any, dtype: torch.dtype) -> None:
    own = zoo.build(type(model.original_model).__name__, dtype)
    plain = zoo.plain_logits(own)
    for composite in ("AttnLRP", "CPLRP", "GIM", "AttnLRPViT", "alpha-beta"):
        ruled, cache = explain(own, TABLES[composite](), names_filter=None)
        assert torch.equal(ruled, plain), composite
        assert bool(torch.isfinite(cache.tokens).all())


@models(*NAMES)
def test_everything_is_undone_after_an_exception_too(model: Any) -> None:
    zoo.plain_logits(model)  # TransformerLens sets some attributes up when it first runs
    before = snapshot(model)
    owners = [place.owner for place in media_embedders(components(model)) if place.owner]
    held = [set(owner.__dict__) for owner in owners]
    explain(model, lenslrp.AttnLRPViT())
    hook = "blocks.0.hook_resid_pre" if owners else "audio_feature_extractor.hook_in"

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    for name in (hook, "embed.hook_in"):
        if name not in model.hook_dict:
            continue
        handle = model.hook_dict[name].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            explain(model, lenslrp.AttnLRPViT())
        handle.remove()
    assert changes(before, model) == []
    assert [set(owner.__dict__) for owner in owners] == held


@models(*NAMES)
def test_every_hook_is_read_or_said_to_be_off_the_path(model: Any) -> None:
    _, cache = explain(model, names_filter=None)
    finite = {name for name in cache if bool(torch.isfinite(cache[name]).all())}
    assert finite | set(cache.coverage.off_path) == set(model.hook_dict)
    assert {
        "blocks.0.attn.hook_pattern",
        "blocks.0.mlp.hook_post",
        "blocks.1.hook_resid_pre",
    } <= finite
    assert cache.coverage.ok


@models(*NAMES)
def test_checkpointing_gives_the_same(model: Any) -> None:
    _, plain = explain(model)
    _, again = explain(model, checkpoint=True)
    torch.testing.assert_close(plain.tokens, again.tokens, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(given_at(plain), given_at(again), rtol=1e-9, atol=1e-12)


@models("ViTForImageClassification", "HubertForCTC")
def test_a_loss_of_ones_own_needs_nothing_else(model: Any) -> None:
    """Inside ``relevance_rules``: patches are leaves unless the pixels are."""
    _, cache = explain(model, lenslrp.AttnLRPViT(), target=1)
    ((name, values),) = media.example(model, batch=2).items()
    projection = media_embedders(components(model))[0].projection
    kept: list[torch.Tensor] = []
    for own_leaf in (False, True):
        given = values.clone().requires_grad_(own_leaf)
        with lenslrp.relevance_rules(model, lenslrp.AttnLRPViT()):
            watch = projection.register_forward_hook(lambda _, args, out: kept.append(out))
            out = model(None, **{name: given})
            watch.remove()
            loss = out[:, ..., 1].reshape(2, -1)[:, -1].sum()
            g, *rest = torch.autograd.grad(loss, [kept[-1], *([given] if own_leaf else [])])
        assert all(bool(torch.isfinite(more).all()) for more in rest)
        patches = (kept[-1] * g).detach()
        rows = patches.flatten(2).transpose(1, 2) if patches.ndim == 4 else patches
        expected = cache.tokens[:, -rows.shape[1] :]
        torch.testing.assert_close(rows.sum(dim=-1), expected, rtol=1e-9, atol=1e-12)


@models("ViTForImageClassification", "HubertForCTC")
def test_doctor_makes_up_an_image_or_a_sound(model: Any) -> None:
    found = lenslrp.examine(model, lenslrp.AttnLRPViT())
    assert found.ok, str(found)
    assert "gamma" in str(found)
    narrow = io.StringIO()
    console = Console(file=narrow, width=60, color_system=None, force_jupyter=False)
    console.print(found.render())
    assert "…" not in narrow.getvalue()


@models("ViTForImageClassification", "HubertForCTC")
def test_rows_are_independent(model: Any) -> None:
    """Learned tokens and positions too have a row for each image."""
    ((name, both),) = media.example(model, batch=2).items()
    _, cache = explain(model)
    for row in range(2):
        _, alone = explain(model, **{name: both[row : row + 1]})
        for part in ("tokens", "positions", "special"):
            if getattr(cache, part) is not None:
                torch.testing.assert_close(getattr(cache, part)[row], getattr(alone, part)[0])
        torch.testing.assert_close(given_at(cache)[row], given_at(alone)[0])


# ------------------------------------------------------------------- rules


@models(*IMAGES[:2])
def test_the_papers_composite_sits_where_the_paper_says(model: Any) -> None:
    sites = explain(model, lenslrp.AttnLRPViT())[1].coverage.sites
    rules = {(row.role, row.rule) for row in sites.itertuples()}
    assert {("convolution", "gamma"), ("linear", "gamma")} <= rules
    assert ("projection", "gamma") not in rules
    gamma = set(sites[sites["rule"] == "gamma"]["hook"])
    assert len(gamma) == 2 + 2 * zoo.LAYERS  # convolution, classifier, two layers of each MLP
    assert any("projection" in hook for hook in gamma)
    assert any(hook.startswith("unembed") for hook in gamma)


@models("ViTModel")
def test_a_pooled_unit_is_explained_through_the_pooler(model: Any) -> None:
    target = Activation("pooler.hook_out", 3)
    for composite in ("AttnLRP", "AttnLRPViT"):
        _, cache = explain(model, TABLES[composite](), target=target)
        assert abs(cache.ledger().error) <= 5 * tolerance(model)
    assert any(hook.startswith("pooler") for hook in cache.coverage.sites["hook"])
    with pytest.raises(lenslrp.InputError, match="pooled and has no position 2"):
        explain(model, target=Activation("pooler.hook_out", 3, 2))


def test_gamma_on_patches_alone_changes_pixels_and_nothing_above() -> None:
    model = zoo.build("ViTForImageClassification")
    _, plain = explain(model, lenslrp.AttnLRP())
    _, gamma = explain(model, {"convolution": Gamma(0.25)})
    torch.testing.assert_close(plain.patches, gamma.patches)
    assert float((plain.pixels - gamma.pixels).abs().max()) > 1e-3


class Flat:
    """A user's own rule (docs/how-to/extending.md): every input of an output gets as much."""

    name = "flat"

    def backward(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = x @ weight.T + (0 if bias is None else bias)
        share = (g * y).sum(dim=-1, keepdim=True) / x.shape[-1]
        return share / x, torch.zeros_like(y)


def test_a_linear_rule_of_ones_own_works_for_the_convolution() -> None:
    model = zoo.build("ViTForImageClassification")
    _, cache = explain(model, {"convolution": Flat()})
    assert abs(cache.ledger().error) < 1e-6
    patch = cache.pixels[0, :, :4, :4]
    torch.testing.assert_close(patch, patch.mean().expand_as(patch))
    torch.testing.assert_close(patch.sum(), cache.patches[0, 0, 0])


# ------------------------------------------------------------------- what if one is forgotten


def forget(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make the engine forget to attach a rule at one kind of place."""
    module = assignment if hasattr(assignment, name) else hook_components
    monkeypatch.setattr(module, name, lambda *_: None)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "HubertForCTC"])
def test_a_forgotten_convolution_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, "attach_convolution")
    with pytest.raises(lenslrp.CoverageError, match="no rule for Convolution in .*Conv"):
        explain(zoo.build(name), lenslrp.AttnLRPViT())


def test_a_forgotten_group_norm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, "attach_unbridged_norm")
    with pytest.raises(lenslrp.CoverageError, match="NativeGroupNorm in audio_feature_ext"):
        explain(zoo.build("HubertForCTC"))


def test_forgotten_positions_unbalance_the_books(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaf_modules, "POSITION_NAMES", ())
    with pytest.raises(lenslrp.CoverageError, match="the ledger does not balance"):
        explain(zoo.build("DeiTForImageClassification"), lenslrp.CPLRP())


@pytest.mark.filterwarnings("ignore:the ledger does not balance:UserWarning")
@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("ViTForImageClassification", "convolution"),
        ("HubertForCTC", "convolution"),
        ("HubertForCTC", "norm"),
    ],
)
@pytest.mark.parametrize("composite", ["CPLRP", "AttnLRPViT"])
def test_a_bias_that_is_not_booked_unbalances_the_books(
    name: str, role: str, composite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, told = zoo.build(name), 0.0
    add = Accounts.add

    def deaf(self: Accounts, term: str, site: Site, amount: torch.Tensor) -> None:
        nonlocal told
        if (term, site.role) == ("biases", role):
            told += float(amount.sum())
        else:
            add(self, term, site, amount)

    monkeypatch.setattr(Accounts, "add", deaf)
    ledger = explain(model, TABLES[composite](), strict=False)[1].ledger()
    assert abs(told) > 1e-4
    assert ledger.target - ledger.accounted == pytest.approx(told, rel=1e-3)


# ------------------------------------------------------------------- targets


@models("ViTForImageClassification")
def test_targets_of_a_classifier(model: Any) -> None:
    labels = {0: "tabby, tabby cat", 1: "Egyptian cat"}
    model.original_model.config.id2label = labels
    logits, cache = explain(model, target=None)
    assert cache.target.text.startswith("top logit 'tabby, tabby cat'") or "Egyptian" in str(
        cache.target
    )
    assert "position" not in cache.target.text
    torch.testing.assert_close(cache.target.value, logits.max(dim=1).values)
    for target in ("Egyptian cat", 1, Logit(1), Logit("Egyptian cat")):
        assert torch.equal(explain(model, target=target)[1].target.value, logits[:, 1])
    assert torch.equal(explain(model, target="tabby cat")[1].target.value, logits[:, 0])
    difference = explain(model, target=LogitDiff("tabby", 1))[1]
    torch.testing.assert_close(difference.target.value, logits[:, 0] - logits[:, 1])
    assert explain(model, target=Contrastive(0))[1].target.text.endswith("against the rest")
    probable = explain(model, target=LogProb(0))[1]
    torch.testing.assert_close(probable.target.value, logits.log_softmax(dim=1)[:, 0])
    assert abs(probable.ledger().nonlinear_target) > 1e-6
    assert torch.equal(
        explain(model, target=["Egyptian cat", 0])[1].target.value,
        torch.stack([logits[0, 1], logits[1, 0]]),
    )


@models("ViTForImageClassification")
def test_several_targets_from_one_pass(model: Any) -> None:
    image = media.example(model, batch=2)
    caches = lenslrp.relevance_for_targets(model, targets=[0, 1], names_filter=[], **image)
    for index, cache in enumerate(caches):
        alone = explain(model, target=index)[1]
        torch.testing.assert_close(cache.tokens, alone.tokens)
        torch.testing.assert_close(cache.pixels, alone.pixels)


@models("ViTForImageClassification")
def test_an_image_can_be_the_input_itself(model: Any) -> None:
    image = media.example(model, batch=2)["pixel_values"]
    _, cache = lenslrp.run_with_relevance(model, image, 1, names_filter=[])
    torch.testing.assert_close(cache.pixels, explain(model)[1].pixels)


@models("ViTForImageClassification")
def test_saved_and_subtracted(model: Any, tmp_path: Path) -> None:
    _, cache = explain(model)
    back = lenslrp.RelevanceCache.load(cache.save(tmp_path / "image.safetensors"))
    for part in ("tokens", "patches", "special", "positions", "pixels"):
        assert torch.equal(getattr(back, part), getattr(cache, part)), part
    assert back.str_tokens == cache.str_tokens
    nothing = cache - back
    assert float(nothing.pixels.abs().max()) == float(nothing.patches.abs().max()) == 0


# ------------------------------------------------------------------- bad input

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("ViTForImageClassification", {"input": "a cat"}, "reads pixel_values .* not text: give pixel"),
    (
        "ViTForImageClassification",
        {"input": torch.tensor([[1, 2]])},
        r"reads pixel_values \[batch, channel=3, height=8, width=8\], not torch.int64 \[1, 2\]",
    ),
    ("ViTForImageClassification", {}, "ViTForImageClassification reads pixel_values .*: give"),
    (
        "ViTForImageClassification",
        {"pixel_values": torch.zeros(1, 3, 8, 9).double()},
        r"must be \[batch, channel=3, height=8, width=8\], not \[1, 3, 8, 9\]",
    ),
    (
        "ViTForImageClassification",
        {"pixel_values": torch.zeros(1, 1, 8, 8).double()},
        r"channel=3.* not \[1, 1, 8, 8\]",
    ),
    (
        "ViTForImageClassification",
        {"pixel_values": torch.zeros(3, 8, 8).double()},
        r"not \[3, 8, 8\]",
    ),
    (
        "ViTForImageClassification",
        {"pixel_values": torch.zeros(1, 3, 8, 8)},
        "pixel_values are torch.float32, the model is torch.float64",
    ),
    (
        "ViTForImageClassification",
        {"pixel_values": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)},
        "torch.uint8: give what the model's own processor makes",
    ),
    (
        "ViTForImageClassification",
        {"pixel_values": torch.full((1, 3, 8, 8), torch.nan).double()},
        "pixel_values has 192 values that are NaN or infinite",
    ),
    (
        "ViTForImageClassification",
        {"pixel_values": [[1.0]]},
        "pixel_values is a tensor, a PIL image, .* not list",
    ),
    (
        "ViTForImageClassification",
        {"input_values": torch.zeros(1, 10).double()},
        "give pixel_values=",
    ),
    (
        "ASTForAudioClassification",
        {"input_values": torch.zeros(1, 8, 12).double()},
        r"\[batch, frame=12, mel=8\], not \[1, 8, 12\]",
    ),
    (
        "HubertForCTC",
        {"input_values": torch.zeros(1, 1, 100).double()},
        r"\[batch, sample\], not \[1, 1, 100\]",
    ),
]


@pytest.mark.parametrize(("name", "options", "match"), REFUSED)
def test_what_cannot_be_read_is_refused(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(lenslrp.InputError, match=match):
        lenslrp.run_with_relevance(zoo.build(name), target=1, **options)


@models("ViTForImageClassification")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "dog"}, r"no class is called 'dog'; nearest: "),
        ({"target": 2}, "class 2 does not exist: they go from 0 to 1"),
        ({"target": Logit(0, position=3)}, "a classifier's logits have no positions; 3 was given"),
        ({"leaves": "words"}, r"leaves must be one of \('pixels', 'patches'\), not 'words'"),
        (
            {"target": lenslrp.targets.Sequence([1, 0])},
            "a Sequence is of tokens that follow a text, and this model",
        ),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask goes with tokens"),
        ({"attention": "fused"}, "no Hugging Face attention to delegate to"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    model: Any, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(lenslrp.InputError, match=match):
        explain(model, **options)


@models("ViTModel", "HubertModel")
@pytest.mark.parametrize("target", [None, 1, Logit(1), [0, 1]])
def test_a_model_without_a_head_says_so(model: Any, target: Any) -> None:
    with pytest.raises(lenslrp.InputError, match="has no head: .* targets.Activation"):
        explain(model, target=target)


def test_what_transformer_lens_refuses_is_a_load_error() -> None:
    speech = zoo.config("Wav2Vec2ForCTC")
    with pytest.raises(lenslrp.LoadError, match="cannot bridge .*Wav2Vec2ForPreTraining cannot be"):
        lenslrp.load(hf.Wav2Vec2ForPreTraining(speech))
    teacher = hf.DeiTForImageClassificationWithTeacher(zoo.config("DeiTForImageClassification"))
    with pytest.raises(lenslrp.LoadError, match="WithTeacher"):
        lenslrp.load(teacher)


@models("ViTModel", "HubertModel")
def test_a_function_of_hidden_states_is_a_target(model: Any) -> None:
    target = Custom(lambda hidden: hidden[:, 0, 3] - hidden[:, -1, 3], "first less last")
    hidden, cache = explain(model, target=target)
    torch.testing.assert_close(cache.target.value, hidden[:, 0, 3] - hidden[:, -1, 3])
    assert abs(cache.ledger().error) <= 5 * tolerance(model)


def test_a_language_model_takes_no_pixels() -> None:
    with pytest.raises(lenslrp.InputError, match="takes no pixel_values; it takes input_ids"):
        lenslrp.run_with_relevance(
            zoo.build("LlamaForCausalLM"),
            torch.tensor([[1, 2]]),
            pixel_values=torch.zeros(1, 3, 8, 8).double(),
        )


# ------------------------------------------------------------------- the paper's sizes

SIZES: dict[str, tuple[int, int, int, int]] = {  # d_model, layers, heads, patch
    "ViT-B/16": (768, 12, 12, 16),
    "ViT-B/32": (768, 12, 12, 32),
    "ViT-L/16": (1024, 24, 16, 16),
    "ViT-L/32": (1024, 24, 16, 32),
    "DeiT-B/16": (768, 12, 12, 16),
}


@pytest.mark.parametrize("name", list(SIZES))
def test_the_papers_models_at_full_size(name: str) -> None:
    """Structure only, on the meta device: every operation has its rule and every rule fires."""
    width, layers, heads, patch = SIZES[name]
    kind = "DeiT" if name.startswith("DeiT") else "ViT"
    config = getattr(hf, f"{kind}Config")(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch,
        num_labels=1000,
    )
    with torch.device("meta"):
        full = getattr(hf, f"{kind}ForImageClassification")(config).eval()
        image = torch.empty(1, 3, 224, 224, requires_grad=True)
    model = lenslrp.load(full)
    with lenslrp.relevance_rules(model, lenslrp.AttnLRPViT(), strict=False) as rules:
        logits = model(None, pixel_values=image)
        rules.verify(logits)
    assert logits.shape == (1, 1000)
    assert all(site.forward == 1 for site in rules.sites)
    found = Counter((site.role, site.rule.name) for site in rules.sites)
    assert found == {
        ("convolution", "gamma"): 1,
        ("linear", "gamma"): 2 * layers + 1,
        ("norm", "normalisation"): 2 * layers + 1,
        ("activation", "identity"): layers,
        ("attention_qk", "uniform"): layers,
        ("attention_av", "uniform"): layers,
        ("softmax", "softmax"): layers,
    }
