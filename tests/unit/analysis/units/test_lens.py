"""Lenses: exact where they can be, consistent elsewhere, saved and loaded, refused when foreign."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import JacobianLens

import lenslrp
from lenslrp.analysis import (
    Direction,
    Lens,
    Neuron,
    ProjectOut,
    compare_lenses,
    fit_relevance_lens,
    fit_ridge_lens,
    steer,
    unembedding_direction,
    writes,
)
from lenslrp.analysis.units.lens_fit import _batches
from lenslrp.errors import InputError
from tests.conformance import zoo
from tests.unit.tiny import tiny, word_tokenizer

STREAM = "blocks.0.hook_out"
SAME = 1e-6  # matrices are kept in float32


def exact(model: Any, tokens: Tensor, layer: int) -> Tensor:
    """d resid_final[t] / d resid_layer[t] under AttnLRP, row by row: [batch, pos, d, d]."""
    names = [f"blocks.{k}.hook_resid_post" for k in (layer, len(model.blocks) - 1)]
    seen: dict[str, Tensor] = {}
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP(), strict=False):
        handles = [
            model.hook_dict[n].register_forward_hook(lambda _, a, out, n=n: seen.update({n: out}))
            for n in names
        ]
        model(tokens)
        for handle in handles:
            handle.remove()
        here, there = (seen[n] for n in names)
        found = here.new_zeros(*here.shape, here.shape[-1])
        for t in range(here.shape[1]):
            for i in range(here.shape[2]):
                (g,) = torch.autograd.grad(there[:, t, i].sum(), here, retain_graph=True)
                found[:, t, i] = g[:, t]
    return found


def test_one_context_and_one_position_give_the_exact_jacobian() -> None:
    model = zoo.build("LlamaForCausalLM")
    lens = fit_relevance_lens(model, torch.full((40, 1), 7), batch_size=20, skip=0)
    expected = exact(model, torch.tensor([[7]]), 0)[0, 0]
    torch.testing.assert_close(lens.matrices[0].double(), expected, rtol=SAME, atol=SAME)
    assert lens.noise[0] < 1e-9
    assert not torch.allclose(expected, torch.eye(16).double(), atol=0.1)
    assert (lens.kind, lens.composite, lens.layers, lens.positions) == (
        "relevance",
        "AttnLRP",
        2,
        40,
    )


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_over_many_contexts_it_tends_to_the_mean_jacobian(name: str) -> None:
    model = zoo.build(name)
    tokens = torch.randint(3, 53, (240, 6))
    lens = fit_relevance_lens(model, tokens, batch_size=60)
    mean = exact(model, tokens, 0)[:, 1:].mean(dim=(0, 1))
    error = float((lens.matrices[0].double() - mean).norm() / mean.norm())
    assert error < 2 * lens.noise[0] < 0.2
    far = float((torch.eye(16).double() - mean).norm() / mean.norm())
    assert far > 3 * error


def test_the_bias_makes_the_mean_residual_right() -> None:
    model = zoo.build("LlamaForCausalLM")
    tokens = torch.randint(3, 53, (40, 4))
    lens = fit_relevance_lens(model, tokens, skip=0)
    _, cache = model.run_with_cache(tokens)
    here, there = (cache[f"blocks.{k}.hook_resid_post"].mean(dim=(0, 1)) for k in (0, 1))
    torch.testing.assert_close(lens.state(0, here), there, rtol=1e-5, atol=1e-5)
    assert torch.equal(lens.state(1, here), here)
    assert torch.equal(lens.transport(1, here), here)


def test_without_later_layers_every_lens_is_the_identity() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config).double().eval()
    for weight in (
        hf.model.layers[1].mlp.down_proj.weight,
        hf.model.layers[1].self_attn.o_proj.weight,
    ):
        torch.nn.init.zeros_(weight)
    model = lenslrp.load(hf)
    tokens = torch.randint(3, 53, (100, 6))
    for lens in (fit_relevance_lens(model, tokens), fit_ridge_lens(model, tokens, ridge=1e-12)):
        torch.testing.assert_close(lens.matrices[0], torch.eye(16), rtol=1e-4, atol=1e-4)
        table = compare_lenses(model, tokens[:4], {"logit": None, "lens": lens})
        assert (table["kl"].abs() < 1e-6).all()
        assert (table["top1"] == 1).all()


def test_comparison_is_the_divergence_of_the_distributions() -> None:
    model = zoo.build("GPT2LMHeadModel")
    tokens = torch.randint(3, 53, (3, 5))
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    hf = model.original_model
    early = hf.lm_head(hf.transformer.ln_f(cache["blocks.0.hook_resid_post"])).detach()
    p, q = (x[:, 1:].reshape(-1, 53).log_softmax(-1) for x in (logits, early))
    table = compare_lenses(model, tokens, {"logit": None}, batch_size=2)
    assert table["kl"][0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-9)
    assert table["top1"][0] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert table["positions"][0] == 12


def test_ridge_reads_states_at_least_as_well_as_no_map() -> None:
    model = zoo.build("GPT2LMHeadModel")
    lens = fit_ridge_lens(model, torch.randint(3, 53, (300, 6)))
    unseen = torch.randint(3, 53, (30, 6))
    table = compare_lenses(model, unseen, {"logit": None, "ridge": lens}).set_index("lens")
    assert table["kl"]["ridge"] < table["kl"]["logit"]


def test_a_lens_carries_what_a_neuron_writes() -> None:
    model = zoo.build("LlamaForCausalLM")
    lens = fit_relevance_lens(model, torch.randint(3, 53, (40, 4)))
    out = model.blocks[0].mlp.W_out[3].detach()
    gain = model.ln_final.weight.detach()
    found = writes(model, Neuron(0, 3), lens=lens).scores
    expected = model.W_U.detach().T @ (gain * (lens.matrices[0].double() @ out))
    torch.testing.assert_close(found, expected)


def test_a_direction_before_a_block_is_carried_from_the_block_before() -> None:
    model = zoo.build("LlamaForCausalLM")
    lens = fit_relevance_lens(model, torch.randint(3, 53, (40, 4)))
    vector = torch.randn(16).double()
    after, before, last = (
        writes(model, Direction(f"blocks.{hook}", vector), lens=lens).scores
        for hook in ("0.hook_resid_post", "1.hook_resid_pre", "1.hook_resid_post")
    )
    assert torch.equal(after, before)
    assert torch.equal(last, writes(model, Direction("blocks.1.hook_resid_post", vector)).scores)
    for hook in ("blocks.0.hook_resid_pre", "embed.hook_out"):
        with pytest.raises(InputError, match="is behind no block"):
            writes(model, Direction(hook, vector), lens=lens)


def test_the_first_tokens_do_not_count() -> None:
    model = zoo.build("LlamaForCausalLM")
    rows = torch.randint(3, 53, (40, 4))
    counted = [c for _, c in _batches(model, rows, 8, 1, "")]
    assert all(c.tolist() == [[False, True, True, True]] * 8 for c in counted)


def test_everything_is_undone_and_the_same_seed_gives_the_same_lens() -> None:
    model = zoo.build("LlamaForCausalLM")
    rows = torch.randint(3, 53, (40, 4))
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    flags = [p.requires_grad for p in model.parameters()]
    one, two, other = (fit_relevance_lens(model, rows, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.matrices[0], two.matrices[0])
    assert not torch.equal(one.matrices[0], other.matrices[0])
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert [p.requires_grad for p in model.parameters()] == flags


def test_padding_does_not_count() -> None:
    model = tiny("llama", tokenizer=word_tokenizer())
    text = ["a b c d e f g", "g h i", "c a"]
    _, counted = next(_batches(model, text, 3, 1, ""))
    assert counted.sum(dim=1).tolist() == [7, 3, 2]  # of 8, 4 and 3 with the first token
    together, apart = (
        compare_lenses(model, text, {"logit": None}, batch_size=size) for size in (3, 1)
    )
    assert together["positions"][0] == 12
    assert together["kl"][0] == pytest.approx(apart["kl"][0], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "prompts", "message"),
    [
        ("LlamaForCausalLM", torch.full((4, 4), 3), "needs at least 16 in each"),
        ("LlamaForCausalLM", "one text", "prompts are several strings or a tensor"),
        ("T5ForConditionalGeneration", torch.full((4, 4), 3), "lenses are for models of one stack"),
        ("ViTForImageClassification", torch.full((4, 4), 3), "embeds no tokens"),
    ],
)
def test_what_no_lens_can_be_fitted_on(name: str, prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_relevance_lens(zoo.build(name), prompts)


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, Lens]:
    model = zoo.build("LlamaForCausalLM")
    return model, fit_relevance_lens(model, torch.randint(3, 53, (40, 4)))


def test_a_lens_comes_back_as_it_was(fitted: tuple[Any, Lens], tmp_path: Path) -> None:
    model, lens = fitted
    path = lens.save(tmp_path / "lens.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["lens.safetensors"]
    back = Lens.load(path, model)
    assert torch.equal(back.matrices[0], lens.matrices[0])
    assert torch.equal(back.biases[0], lens.biases[0])
    for name in ("noise", "kind", "model", "composite", "layers", "positions", "seed"):
        assert getattr(back, name) == getattr(lens, name)
    with pytest.raises(InputError, match="the lens has no layer 5; it has 0"):
        lens.transport(5, torch.zeros(16))
    with pytest.raises(InputError, match="does not exist"):
        lens.save(tmp_path / "no" / "lens.safetensors")


def test_a_lens_of_another_model_is_refused(fitted: tuple[Any, Lens], tmp_path: Path) -> None:
    path = fitted[1].save(tmp_path / "lens.safetensors")
    with pytest.raises(InputError, match=r"was fitted on .*Llama.*this is .*GPT2"):
        Lens.load(path, zoo.build("GPT2LMHeadModel"))


def test_foreign_files_are_refused(fitted: tuple[Any, Lens], tmp_path: Path) -> None:
    good = fitted[1].save(tmp_path / "lens.safetensors")
    tensors = load_file(good)
    from safetensors import safe_open

    with safe_open(str(good), framework="pt") as file:
        manifest = json.loads(file.metadata()["manifest"])

    def written(tensors: dict[str, Tensor], manifest: Any) -> Path:
        path = tmp_path / "other.safetensors"
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        save_file(tensors, path, metadata={"manifest": text})
        return path

    square = {"matrix.0": torch.zeros(16, 8), "bias.0": torch.zeros(8)}
    cases = [
        (written, (tensors, {**manifest, "format": "else"}), "has no lenslrp.lens manifest"),
        (written, (tensors, "{"), "its manifest is not JSON"),
        (written, (tensors, {**manifest, "version": 2}), "is a lens of version 2; this reads 1"),
        (written, (tensors, {**manifest, "layers": "2"}), "has no layers, or of a wrong type"),
        (written, ({**tensors, "../x": torch.zeros(1)}, manifest), "that no lens has: '../x'"),
        (written, ({"bias.0": tensors["bias.0"]}, manifest), "not of the same layers"),
        (written, (square, manifest), "expected square ones"),
    ]
    for make, given, message in cases:
        with pytest.raises(InputError, match=message):
            Lens.load(make(*given))
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match="has no lenslrp.lens manifest"):
        Lens.load(tmp_path / "bare.safetensors")
    torch.save(tensors, tmp_path / "pickle.safetensors")
    with pytest.raises(InputError, match="is not a safetensors file"):
        Lens.load(tmp_path / "pickle.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-20])
    with pytest.raises(InputError, match="is not a safetensors file"):
        Lens.load(tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match="no file"):
        Lens.load(tmp_path / "none.safetensors")


def booted(name: str = "gpt2") -> TransformerBridge:
    """A bridge as TransformerLens' lens wants one, in float32: its words are `a` to `u`."""
    return tiny(name, tokenizer=word_tokenizer()).to(torch.float32)


def random_lens(model: TransformerBridge) -> Lens:
    draw = torch.Generator().manual_seed(4)
    matrix = torch.eye(16) + torch.randn(16, 16, generator=draw) / 4
    name = str(model.cfg.model_name)
    return Lens({0: matrix}, {0: torch.ones(16)}, {0: 0.1}, "relevance", name, "AttnLRP", 2, 99, 0)


def test_transformer_lens_reads_our_lens_and_we_read_its() -> None:
    model = booted()
    lens = random_lens(model)
    theirs = lens.to_transformer_lens()
    state = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(theirs.transport(state, 0), lens.transport(0, state))
    tokens = torch.tensor([[3, 17, 5, 8]])
    read = theirs.readout(model, tokens, layers=[0], return_full_logits=True)
    _, cache = model.run_with_cache(tokens)
    final = lens.transport(0, cache["blocks.0.hook_out"])
    torch.testing.assert_close(read.lens_logits[0], model.unembed(model.ln_final(final))[0])
    again = Lens.from_transformer_lens(theirs, model)
    assert torch.equal(again.matrices[0], lens.matrices[0]) and again.kind == "jacobian"
    assert torch.equal(again.state(0, state), lens.transport(0, state))
    unit = Neuron(0, 3)
    expected = writes(model, unit, lens=lens).scores
    assert torch.equal(writes(model, unit, lens=again).scores, expected)
    given = {"corpus": "none", "skip_first_positions": 1, "show_progress": False}
    fitted = JacobianLens.fit(model, ["a b c d e f g h"] * 2, source_layers=[0], **given)
    found = Lens.from_transformer_lens(fitted, model)
    assert torch.equal(found.transport(0, state), fitted.transport(state, 0))
    other = JacobianLens({0: torch.eye(8)}, n_prompts=1, d_model=8)
    with pytest.raises(InputError, match="d_model 8"):
        Lens.from_transformer_lens(other, model)
    alone = Lens({}, {}, {}, "relevance", "x", "AttnLRP", 1, 0, 0)
    with pytest.raises(InputError, match="has one layer at least; this has none"):
        alone.to_transformer_lens()


def test_interventions_of_either_lens_are_those_of_the_other() -> None:
    """Their hooks with our lens; our operations along the directions of theirs."""
    model = booted()
    lens = random_lens(model)
    theirs, tokens, at = lens.to_transformer_lens(), torch.tensor([[3, 17, 5, 8]]), STREAM

    def after(hooks: Any = (), operation: Any = ()) -> Tensor:
        with steer(model, operation), model.hooks(fwd_hooks=list(hooks)):
            return model.run_with_cache(tokens)[1][at]

    plain = after()
    a, b = theirs.lens_vectors(model, ["a", "b"], 0)
    removed = after(theirs.ablation_hooks(model, ["a", "b"], [0]))
    ours = ProjectOut((Direction(at, a), Direction(at, b)))
    torch.testing.assert_close(removed, after(operation=ours), rtol=1e-4, atol=1e-4)
    swapped = after(theirs.swap_hooks(model, "a", "b", [0]))
    basis = torch.stack([a, b], dim=1)
    coordinates = plain @ torch.linalg.pinv(basis).T
    assert not torch.allclose(swapped, plain, atol=1e-2)
    expected = plain + (coordinates.flip(-1) - coordinates) @ basis.T
    torch.testing.assert_close(swapped, expected, rtol=1e-4, atol=1e-4)
    gain = model.ln_final.original_component.weight
    for token, other in (("a", None), ("a", "b")):
        found = unembedding_direction(model, token, at, against=other, lens=lens)
        ids = [model.tokenizer.convert_tokens_to_ids(t) for t in (token, other) if t]
        row = model.W_U[:, ids[0]] - (model.W_U[:, ids[1]] if other else 0)
        row = gain * row
        expected = (row - row.mean()) @ lens.matrices[0]
        torch.testing.assert_close(found.vector, expected.detach(), rtol=1e-4, atol=1e-5)
    assert unembedding_direction(model, "a", "blocks.1.hook_in", lens=lens).vector.equal(
        unembedding_direction(model, "a", at, lens=lens).vector
    )
    with pytest.raises(InputError, match="blocks.0.hook_in is not the residual stream after a bl"):
        unembedding_direction(model, "a", "blocks.0.hook_in", lens=lens)
