"""Steps of every stage on a GPU that is pretended: a GPU's rules, a CPU's numbers, and every wait of the host known."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pretend_gpu import INT8, gpu

from uae_fast.checkpoint import checkpoints, read_state
from uae_fast.guards import StopRequest
from uae_fast.inference import generate, open_models, reconstruct
from uae_fast.models.loading import load_models
from uae_fast.models.reward import _Bicubic
from uae_fast.optim import RunningMean, build_optimizer
from uae_fast.parquet import open_images
from uae_fast.rollout.decoding import CHECK_EVERY
from uae_fast.run import Position
from uae_fast.speed import Speed
from uae_fast.trainer import STAGES, take_step, train

LORA = ("models.encoder=lora", "models.decoder=lora")
CHECKPOINTED = ("models.gradient_checkpointing=true", "same_sampler.graph=true")
KEPT = {
    kind: (*LORA, f"models.encoder_quantization={kind}", f"models.decoder_quantization={kind}")
    for kind in ("nf4", "int8", "fp8")
}
OFFLOADED = (*LORA, "models.offload=true")
CASES = [
    *((number, options) for options in ((), LORA + CHECKPOINTED) for number in range(4)),
    *((number, (*options, "optimizer.name=adamw8bit")) for options in KEPT.values() for number in (2, 3)),
    (1, OFFLOADED), (2, (*KEPT["nf4"], "models.offload=true")), (3, (*OFFLOADED, "optimizer.name=adamw")),
]  # fmt: skip
RUNS = [
    (2, (*LORA, "models.dtype=bfloat16", "same_sampler.fp8=true", "same_sampler.graph=true")),
    (3, (*KEPT["nf4"], "models.dtype=bfloat16", "models.offload=true", "optimizer.name=adamw")),
]
CHECKS = "rollout/decoding.py:write:_local_scalar_dense"  # how many captions are unfinished?
READS = {"models/encoder.py:read:_local_scalar_dense": 2}  # transformers: does the mask hide anything?
FETCH = {"guards.py:fetch:_to_copy": 1}
WRITES = {
    # transformers' vision tower: how large are the images, where do their windows end?
    "models/encoder.py:prompt:_to_copy": 12, "models/encoder.py:prompt:repeat_interleave": 1,
    "models/encoder.py:prompt:unique_consecutive": 1, "models/encoder.py:prompt:index": 4,
    "rollout/decoding.py:__init__:_local_scalar_dense": 1,  # as READS, of the prompts
    "rollout/captions.py:sample_captions:_local_scalar_dense": 1,  # the longest
    "rollout/captions.py:sample_captions:_to_copy": 1,  # their text
}  # fmt: skip
LENGTHS = {"stages/generation_for_understanding.py:rollout:_to_copy": 1}
WAITS = {0: READS | FETCH, 1: READS | FETCH, 2: WRITES | READS | LENGTHS | FETCH, 3: WRITES | READS | FETCH}


def steps(number, config, count=2):
    """The metrics of a stage's first steps, one after another."""
    models = load_models(config)
    models.encoder.freeze_reader()
    stage = STAGES[number](config, models)
    groups = stage.groups()
    models.bring(stage.trains)
    optimizer = build_optimizer(groups, config.optimizer)
    mean = RunningMean([p for group in groups for p in group["params"]], getattr(stage.settings, "ema_decay", 0.0))
    data = open_images(config.data.train, "data.train", config.data, captions=stage.needs_captions)
    run = SimpleNamespace(config=config, models=models, stop=StopRequest(), position=Position())
    speed = Speed(stage, config)
    for step in range(count):
        speed.start()
        examples = data.batch(step, stage.settings.images, config.seed, stage.name)
        values, bad = take_step(stage, examples, step, optimizer, mean, run)
        speed.measure(values)
        assert not bad
        yield {k: v for k, v in values.items() if "second" not in k and "memory" not in k and k != "mfu"}


def run_and_use(stage, options, world, small_config, rel=1e-6):
    """From a run's first measurement to `uae-fast reconstruct`, interrupted once."""
    config = small_config(
        world, f"stages=[{stage}]", "checkpoint.every=1", "checkpoint.keep=9", "evaluate.images=2", "render.batch=4",
        f"stage{stage}.micro_batch=4", *options, "device=cuda",
    )  # fmt: skip
    folder = Path(config.run)

    def last():
        values = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        return {k: v for k, v in values.items() if k in ("step", "loss", "reward", "grad_norm", "ratio/max", "kl")}

    train(config)
    whole = last()
    for checkpoint in checkpoints(folder / "checkpoints")[2:]:
        shutil.rmtree(checkpoint)
    assert read_state(checkpoints(folder / "checkpoints")[-1])["stage_step"] == 1
    train(config, resume=True)
    assert last() == pytest.approx(whole, rel=rel)
    config, models = open_models(folder, None)
    (pair,) = reconstruct(config, models, [world / "heldout" / "scene-00000.png"], seed=0)
    assert pair.drawn.size == generate(config, models, pair.caption, seed=0).size and -1 <= pair.reward <= 1


@pytest.mark.parametrize("number, options", CASES)
def test_steps_on_a_gpu_are_those_on_a_cpu(number, options, world, small_config):
    more = ("stage2.micro_batch=4", "stage3.micro_batch=4", *options)
    config = small_config(world, *(option for option in more if "graph" not in option), "device=cpu")
    on_cpu = list(steps(number, config))
    with gpu(deterministic=True) as pretended:
        found = []
        for values in steps(number, small_config(world, *more, "device=cuda:0")):
            found.append(values)
            waits = dict(pretended.waits)
            pretended.waits.clear()
        assert pretended.current == torch.device("cuda", 0)
    for values, expected in zip(found, on_cpu, strict=True):
        if "int8" in str(options):  # of two numbers next to a tie it takes the other: other captions
            assert values["ratio/max"] == values["ratio/mean"] == 1
        else:
            assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)
    checks = waits.pop(f"uae_fast/{CHECKS}", 0)
    assert checks == (0 if number < 2 else -(-int(found[-1]["completions/max_length"]) // CHECK_EVERY))
    # Parts that take turns; bitsandbytes' outliers, and after each parameter's update its optimisers
    known = {"offload.py:move:_to_copy": "offload" in str(options), INT8: "int8" in str(options),
             ":synchronize": "optimizer.name=adamw" not in options}  # fmt: skip
    of_others = {line for line in waits if line.endswith(tuple(known))}
    assert all(is_due == any(line.endswith(end) for line in of_others) for end, is_due in known.items())
    waits = {line: count for line, count in waits.items() if line not in of_others}
    assert waits == {f"uae_fast/{line}": count for line, count in WAITS[number].items()}


@pytest.mark.parametrize("stage, options", RUNS)
def test_a_run_is_measured_goes_on_and_is_used(stage, options, world, small_config):
    with gpu():
        run_and_use(stage, options, world, small_config)


def test_what_a_gpu_would_refuse():
    """The rules that the steps above pass."""
    with gpu(deterministic=True) as pretended:
        x, graph = torch.rand(4, 4, device="cuda"), torch.cuda.CUDAGraph()
        assert x.device == torch.device("cuda", 0) and x.is_cuda
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(4)
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="deterministic"):
            x.cumsum(0)
        assert not pretended.waits
        assert x.sum().item() > 0 and len(x[x > 2]) == 0 and len(x[torch.tensor([1])]) == 1
        assert x.cpu().shape == torch.tensor([1.0], device="cuda").expand(4, 4).shape
        assert pretended.waits == {
            "elsewhere:_local_scalar_dense": 1, "elsewhere:index": 2, "elsewhere:_to_copy": 2,
        }  # fmt: skip
        for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: torch.tensor(1.0, device="cuda")):
            with pytest.raises(RuntimeError, match="while a CUDA graph is recorded"), torch.cuda.graph(graph):
                wait()


def test_a_recorded_graph_computes_on_its_memory():
    with gpu():
        x, once, graph = torch.ones(3, device="cuda"), torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.add_(once)
            twice = x * 2
        assert x.tolist() == [1, 1, 1]  # recording computes nothing
        graph.replay()
        x.mul_(10)
        graph.replay()
        assert x.tolist() == [21, 21, 21] and twice.tolist() == [42, 42, 42]
        del once
        with pytest.raises(RuntimeError, match="given back"):
            graph.replay()


def test_a_photograph_is_resized_for_a_small_encoder():
    image = torch.rand(1, 3, 1400, 900)
    with gpu():
        images = image.to("cuda")
        with pytest.raises(RuntimeError, match="shared memory"):
            torch.nn.functional.interpolate(images, (20, 20), mode="bicubic", antialias=True)
        small = _Bicubic.apply(images, (20, 20))
        assert small.is_cuda and _Bicubic.apply(images, (32, 32)).is_cuda
        small = small.cpu()
    assert torch.equal(small, torch.nn.functional.interpolate(image, (20, 20), mode="bicubic", antialias=True))


def test_the_rewards_resizing_repeats():
    with gpu(deterministic=True):
        images = torch.rand(1, 3, 12, 12, device="cuda").requires_grad_()
        _Bicubic.apply(images, (8, 8)).sum().backward()
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.nn.functional.interpolate(images, (8, 8), mode="bicubic", antialias=True).sum().backward()
