"""The caption engine: against transformers' generation, the trainer's log-probs, and itself in other batches."""

import pytest
import torch
from PIL import Image
from test_graphs import Tape
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from uae_kernels import linear_logprobs

from uae_fast.config import load_config
from uae_fast.models.loading import load_models
from uae_fast.rollout import decoding
from uae_fast.rollout.captions import sample_captions
from uae_fast.rollout.decoding import Writing, batch_of, choose, is_checked, write
from uae_fast.tiny.scenes import sample_scenes

SIZES = [(32, 32), (48, 32), (32, 48), (64, 48)]
IMAGES = [Image.fromarray(s.draw()).resize(SIZES[i % 4]) for i, s in enumerate(sample_scenes("heldout", 24, 0))]
LONGEST = 40


@pytest.fixture(scope="module")
def encoder():
    """A random language model, whose greedy captions of 24 images take 3 to 40 tokens."""
    encoder = load_models(load_config("tiny")).encoder
    encoder.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.model.model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1, generator=generator)
        encoder.head.weight[encoder.eos_id] *= 1.5
    return encoder


@pytest.fixture(scope="module")
def prompt(encoder):
    prompt = encoder.prompt(IMAGES)
    assert len(set(prompt.mask.sum(1).tolist())) > 1  # padded on the left
    return prompt


@pytest.fixture(params=[1, decoding.CHECK_EVERY])
def every(request, monkeypatch):
    """Steps between two checks, as on a CPU and as on a GPU."""
    monkeypatch.setattr(decoding, "is_checked", lambda written, _: written % request.param == 0)
    return request.param


def sample(encoder, prompt, count=24, **settings):
    return sample_captions(
        encoder, prompt, list(range(count)), **{"temperature": 1.0, "max_new_tokens": LONGEST, **settings}
    )


def watched(encoder, call):
    """What `call` gives, and the shapes (rows, tokens) of the language model's forward passes in it."""
    shapes = []
    hook = encoder.model.model.language_model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    try:
        return call(), shapes
    finally:
        hook.remove()


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(encoder, prompt, every):
    """From pixels, with its own positions, masks, cache and suppression; the batch meanwhile drops from 24 to 8."""
    ours, shapes = watched(encoder, lambda: sample(encoder, prompt, temperature=0))
    theirs = encoder.model.generate(
        input_ids=prompt.ids,
        attention_mask=prompt.mask.long(),
        mm_token_type_ids=(prompt.ids == encoder.model.config.image_token_id).int(),
        max_new_tokens=LONGEST,
        do_sample=False,
        suppress_tokens=encoder.suppressed_ids,
        **encoder.image_processor(IMAGES, return_tensors="pt"),
    )[:, prompt.ids.shape[1] :]
    lengths = ours.mask.sum(1)
    assert lengths.amin() == 3 and lengths.amax() == LONGEST and len(set(lengths.tolist())) > 10
    assert [rows for rows, _ in shapes[1:]] == sorted((rows for rows, _ in shapes[1:]), reverse=True)
    assert {rows for rows, _ in shapes} == {24, 16, 8}
    assert torch.equal(ours.ids, theirs)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0, 1.5])
def test_log_probs_are_the_trainers(encoder, prompt, temperature):
    captions = sample(encoder, prompt, temperature=temperature)
    expected = linear_logprobs(
        encoder.caption_states(prompt, captions.ids, captions.mask),
        encoder.head.weight,
        captions.ids.masked_fill(~captions.mask, -100),
        temperature=temperature or 1.0,
    )
    assert (captions.logprobs - expected).abs().max() < 1e-5
    assert captions.logprobs[captions.mask].amin() < -1 and not captions.logprobs[~captions.mask].any()
    kept = (expected.exp() * captions.mask).sum() / captions.mask.sum()
    assert kept < 0.99  # not certain of its tokens: a wrong temperature would show


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_both_engines_write_the_same_captions(encoder, prompt, temperature):
    own = encoder.model.generation_config
    own.repetition_penalty = 1.5  # of a released model's file
    ours = sample(encoder, prompt, 48, temperature=temperature)
    theirs, shapes = watched(encoder, lambda: sample(encoder, prompt, 48, temperature=temperature, engine="generate"))
    own.repetition_penalty = None
    assert ours.texts == theirs.texts and torch.equal(ours.ids, theirs.ids) and torch.equal(ours.mask, theirs.mask)
    assert (ours.logprobs - theirs.logprobs).abs().max() < 1e-5
    assert encoder.model.generation_config is own
    assert shapes[0] == (48, prompt.ids.shape[1]) and {rows for rows, _ in shapes} == {48}


def test_a_prompt_is_computed_once_for_all_its_captions(encoder):
    prompt, count = encoder.prompt(IMAGES[:6]), 48
    captions, shapes = watched(encoder, lambda: sample(encoder, prompt, count))
    repeated, apart = watched(encoder, lambda: sample(encoder, prompt.repeat(8), count))
    width = prompt.ids.shape[1]
    assert shapes[0] == (6, width) and apart[0] == (48, width) and shapes[1:] == apart[1:]
    assert captions.texts == repeated.texts and torch.equal(captions.ids, repeated.ids)
    assert (captions.logprobs - repeated.logprobs).abs().max() < 1e-5
    assert len(set(captions.texts)) > 40


def test_finished_captions_leave_the_batch_and_change_nothing(encoder, prompt, every, monkeypatch):
    found, shapes = watched(encoder, lambda: sample(encoder, prompt, 48))
    lengths = found.mask.sum(1)
    for step, (rows, tokens) in enumerate(shapes[1:], 1):
        last_check = step // every * every
        unfinished = int((lengths > last_check).sum()) if last_check else 48
        assert (rows, tokens) == (min(48, batch_of(unfinished)), 1), step
    assert {rows for rows, _ in shapes[1:]} >= {48, 32, 16}
    monkeypatch.setattr(decoding, "SMALLEST", 48)
    whole, full = watched(encoder, lambda: sample(encoder, prompt, 48))
    assert {rows for rows, _ in full[1:]} == {48} and len(full) == len(shapes)
    assert torch.equal(found.ids, whole.ids) and found.texts == whole.texts
    assert (found.logprobs - whole.logprobs).abs().max() < 1e-5


def test_captions_are_the_same_again_bit_for_bit(encoder, prompt):
    first, again = sample(encoder, prompt, 48), sample(encoder, prompt, 48)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.logprobs, again.logprobs)


@torch.no_grad()
def test_a_recorded_step_writes_what_the_step_itself_writes(encoder, prompt, every, monkeypatch):
    graphs = []

    def recorded(step, _):
        with Tape() as graph:
            step()
        graphs.append(graph)
        return graph.replay

    draws = torch.rand(48, LONGEST, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = write(encoder, prompt, draws, 1.0)
    monkeypatch.setattr(decoding, "repeated", recorded)
    replayed, shapes = watched(encoder, lambda: write(encoder, prompt, draws, 1.0))
    assert torch.equal(plain[0], replayed[0]) and torch.equal(plain[1], replayed[1])
    assert len(shapes) == 1 + len(graphs) < 6  # Python ran the prompts, and one step of each batch
    names = {function.name() for graph in graphs for function, *_ in graph.operations}
    assert not names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::lift_fresh"}


@torch.no_grad()
def test_a_step_never_waits_for_the_device(encoder, prompt):
    """Fake tensors have no numbers to wait for."""
    draws = torch.rand(48, LONGEST, dtype=torch.float64)
    with FakeTensorMode(allow_non_fake_inputs=True), encoder.acting_as("policy") as language_model:
        writing = Writing(encoder, language_model, prompt, draws, 1.0)
        for count in (32, 16):
            writing.step()
            writing.keep(count)
        assert writing.cache.layers[0][0].shape[:3] == (16, 2, 64)
        with pytest.raises(DataDependentOutputException):
            int(writing.finished.sum())


def test_a_cache_holds_each_slot_once(encoder, prompt):
    """Slots of P + T − 1 tokens, rounded up to 8; nothing beyond what was read is seen."""
    draws = torch.zeros(48, LONGEST, dtype=torch.float64)
    with torch.no_grad(), encoder.acting_as("policy") as language_model:
        writing = Writing(encoder, language_model, prompt, draws, 1.0)
        width = prompt.ids.shape[1]
        assert {x.shape for layer in writing.cache.layers for x in layer} == {(48, 2, 64, 32)} and width == 22
        for step in range(3):
            writing.step()
            assert torch.equal(writing.visible[:, :width], prompt.mask.repeat_interleave(2, 0))
            assert (
                writing.visible[:, width : width + step + 1].all() and not writing.visible[:, width + step + 1 :].any()
            )
            for layer in writing.cache.layers:
                for states in layer:
                    assert states[:, :, width + step].any() and not states[:, :, width + step + 1 :].any()


def test_a_choice_is_the_token_under_its_number():
    logits = torch.tensor([[0.0, 1.0, 9.0, -1.0]]).expand(5, -1)
    draws = torch.tensor([0.0, 0.2, 0.3, 0.9, 1 - 2**-53], dtype=torch.float64)
    share = torch.tensor([1.0, 2.718281828, 0.0, 0.367879441]) / 4.086161269  # 2 is never chosen: .245, .665, 0, .09
    tokens, logprobs = choose(logits, draws, 1.0, torch.tensor([2]))
    assert tokens.tolist() == [int((share.cumsum(0) <= x).sum()) for x in draws[:-1].tolist()] + [3] == [0, 0, 1, 1, 3]
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    greedy, logprobs = choose(logits, draws, 0, torch.tensor([2]))
    assert greedy.tolist() == [1] * 5 and torch.allclose(logprobs, logits.log_softmax(-1)[:, 1])


def test_a_cpu_is_asked_at_every_step_and_a_gpu_at_some():
    asked = {name: [i for i in range(1, 10) if is_checked(i, torch.device(name))] for name in ("cpu", "cuda")}
    assert asked == {"cpu": list(range(1, 10)), "cuda": [4, 8]}


def test_seeds_must_divide_among_the_images(encoder):
    with pytest.raises(ValueError, match="7 are not the same number for each of 2 images"):
        sample(encoder, encoder.prompt(IMAGES[:2]), 7)


@pytest.mark.parametrize("unfinished, rows", [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64)])
def test_batches_are_powers_of_two(unfinished, rows):
    assert batch_of(unfinished) == rows
