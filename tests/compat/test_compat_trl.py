"""compat.trl against the installed TRL: its functions, its loss, its trainer."""

import inspect
from dataclasses import MISSING, fields
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from uae_kernels.compat import _entropy
from uae_kernels.compat import trl as compat

pytest.importorskip("trl")
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import grpo_trainer, utils

B, T, H, V = 4, 6, 16, 300
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]


def leaf(*shape, scale=1.0):
    return (scale * torch.randn(shape)).requires_grad_()


def compare(ours, theirs, leaves, **tolerance):
    """Values, and gradients of the leaves for the same random cotangents."""
    cotangents = [torch.randn_like(y) for y in ours]
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, **tolerance)
    ours, theirs = (torch.autograd.grad(outputs, leaves, cotangents) for outputs in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().sum() > 0
        assert_close(a, b, **tolerance)


def arguments(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_public_signatures():
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        assert arguments(getattr(compat, name)) == arguments(getattr(utils, name))
    assert arguments(compat.ChunkedLogProbFunction.apply) == arguments(ChunkedLogProbFunction.forward)[1:]
    assert arguments(utils.add_fused_lm_head)[0][0] == "model"

    defaults = {f.name: f.default for f in fields(GRPOConfig) if f.default is not MISSING}
    options = [(name, value) for name, _, value in arguments(compat.grpo_loss) if name in defaults]
    assert options == [(name, defaults[name]) for name, _ in options]
    tensors = {"per_token_logps", "advantages", "mask", "entropies", "num_items_in_batch"} | {
        f"{which}_per_token_logps" for which in ("old", "ref", "sampling")
    }
    assert {name for name, *_ in arguments(compat.grpo_loss)} == tensors | {name for name, _ in options}


# Log-probabilities from logits


@pytest.mark.parametrize("columns", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax(columns, masked):
    logits = leaf(2, T, V, scale=3)
    index = torch.randint(0, V, (2, T, columns) if columns else (2, T))
    mask = (torch.rand(index.shape) > 0.4).long() if masked else None
    call = (logits, index, 0.7, mask)
    ours, theirs = (module.selective_log_softmax(*call) for module in (compat, utils))
    compare([ours], [theirs], [logits], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax_and_entropy(masked):
    logits, index = leaf(2, T, V, scale=3), torch.randint(0, V, (2, T))
    mask = torch.rand(2, T) > 0.4 if masked else None
    ours, theirs = (
        module.selective_log_softmax_and_entropy(logits, index, temperature=0.7, row_mask=mask)
        for module in (compat, utils)
    )
    compare(ours, theirs, [logits], rtol=1e-5, atol=5e-6)
    assert not compat.selective_log_softmax_and_entropy(logits, index, False)[1].requires_grad


def test_many_columns_stay_defined():
    logits = torch.randn(4, 5)
    logits[0, 1] = logits[1] = -torch.inf
    logits[3] = torch.nan
    logits.requires_grad_()
    index = torch.tensor([[0, 1, 4], [0, 1, 2], [2, -100, 7], [-100, -1, 5]])
    logprobs = compat.selective_log_softmax(logits, index)
    expected = logits[[0, 2]].log_softmax(-1)
    assert_close(logprobs[0], expected[0, [0, 1, 4]])
    assert (logprobs[1] == -torch.inf).all()
    assert_close(logprobs[2], torch.stack([expected[1, 2], *torch.zeros(2)]))
    assert (logprobs[3] == 0).all()
    (grad,) = torch.autograd.grad(logprobs[2:].sum(), logits)
    assert grad.isfinite().all() and grad[2].abs().sum() > 0


def test_low_precision_logits_give_fp32():
    logits, index = (3 * torch.randn(2, T, V)).bfloat16(), torch.randint(0, V, (2, T))
    ours = compat.selective_log_softmax(logits, index)
    assert ours.dtype == torch.float32
    assert_close(ours, utils.selective_log_softmax(logits.float(), index), rtol=1e-5, atol=2e-6)


# The linear head

HEADS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "softcap": dict(final_logit_softcapping=5.0, logit_scale=1.3, temperature=1.2),
}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("outputs", [(), ("log_probs", "entropy")])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_chunked_logprobs(head, bias, outputs, trainable):
    hidden, weight = leaf(19, H), leaf(V, H, scale=0.3)
    shift = leaf(V) if bias else None
    leaves = [hidden]
    if trainable:
        leaves += [weight, shift] if bias else [weight]
    else:
        weight, shift = weight.detach(), shift.detach() if bias else None
    options = dict(temperature=1.0) | HEADS[head]
    call = (
        hidden, weight, shift, torch.randint(0, V, (19,)), options.pop("temperature"), 64,
        options.get("final_logit_softcapping"), options.get("logit_scale", 1.0), outputs,
    )  # fmt: skip
    ours, theirs = (function.apply(*call) for function in (compat.ChunkedLogProbFunction, ChunkedLogProbFunction))
    assert [x is None for x in ours] == [x is None for x in theirs]
    ours, theirs = ([x for x in five if x is not None] for five in (ours, theirs))
    compare(ours, theirs, leaves, rtol=1e-5, atol=1e-5)


def test_products_follow_autocast_and_the_hidden_states():
    hidden, weight, targets = leaf(64, H), leaf(V, H), torch.randint(0, V, (64,))
    call = (hidden, weight, None, targets, 1.0, 64, None, 1.0, ())
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    rounded = (hidden.bfloat16().double() @ weight.bfloat16().double().T).log_softmax(-1)
    rounded = rounded.gather(1, targets[:, None])[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (f.apply(*call)[0] for f in (compat.ChunkedLogProbFunction, ChunkedLogProbFunction))
    assert ours.dtype == theirs.dtype == torch.float32
    assert_close(ours.double(), rounded, rtol=0, atol=1e-5)  # TRL rounds the logits to bf16 as well
    assert (theirs - rounded).abs().max() > 100 * (ours - rounded).abs().max()
    assert_close(compat.ChunkedLogProbFunction.apply(*call)[0].double(), exact, rtol=0, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (ours, theirs)), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() < 2e-2 * b.norm()


def test_entropies_pay_for_their_gradient_only_when_it_is_asked_for(monkeypatch):
    calls, function = [], _entropy.linear_logprobs
    monkeypatch.setattr(
        _entropy, "linear_logprobs", lambda *a, **k: calls.append(k["entropy_grad"]) or function(*a, **k)
    )
    hidden, weight, targets = leaf(5, H), torch.randn(V, H), torch.randint(0, V, (5,))
    logprobs, entropies, *_ = compat.ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, 64, outputs=("entropy",)
    )
    torch.autograd.grad(logprobs.sum(), hidden)
    assert calls == [False] and entropies.requires_grad
    torch.autograd.grad(entropies.sum(), hidden)
    assert calls == [False, True]


def test_unsupported_arguments_raise():
    hidden, weight, targets = torch.randn(3, H), torch.randn(V, H), torch.zeros(3, dtype=torch.int64)
    apply = compat.ChunkedLogProbFunction.apply
    with pytest.raises(NotImplementedError, match="outputs: is_top1, log_sum_sq_probs, mean_logits"):
        apply(hidden, weight, None, targets, 1.0, 64)
    with pytest.raises(NotImplementedError, match="outputs: varentropy"):
        apply(hidden, weight, None, targets, 1.0, 64, outputs=("varentropy",))
    with pytest.raises(ValueError, match="temperature"):
        apply(hidden, weight, None, targets, 0.0, 64, outputs=())
    with pytest.raises(TypeError, match="plain dense float tensor"):
        apply(hidden, torch.randint(0, 9, (V, H)), None, targets, 1.0, 64, outputs=())
    split = torch.nn.Parameter(weight)
    split.ds_id = 7
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        apply(hidden, split, None, targets, 1.0, 64, outputs=())
    for function in (compat.selective_log_softmax, compat.selective_log_softmax_and_entropy):
        with pytest.raises(ValueError, match="row_mask"):
            function(torch.randn(2, 3, V), torch.zeros(2, 3, dtype=torch.int64), row_mask=torch.ones(2, 1))
        with pytest.raises(ValueError, match="temperature"):
            function(torch.randn(2, 3, V), torch.zeros(2, 3, dtype=torch.int64), temperature=0.0)
    for shape in ((2, 2), (2,), (2, 3, 1, 1)):
        with pytest.raises(ValueError, match="index"):
            compat.selective_log_softmax(torch.randn(2, 3, V), torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="index"):
        compat.selective_log_softmax_and_entropy(torch.randn(2, 3, V), torch.zeros(2, 3, 2, dtype=torch.int64))


# The loss


def trl_loss(logps, entropies, inputs, **options):
    """GRPOTrainer's own `_compute_loss` on given log-probabilities, without a trainer around it."""
    args = SimpleNamespace(**{f.name: f.default for f in fields(GRPOConfig)})
    vars(args).update(options, steps_per_generation=1)
    one_process = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, pad_across_processes=lambda x, **_: x, num_processes=1,
        sync_gradients=False,
    )  # fmt: skip
    trainer = SimpleNamespace(
        **vars(args) | dict(args=args, epsilon_low=args.epsilon, current_gradient_accumulation_steps=1),
        accelerator=one_process,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        _entropy_bonus_enabled=args.entropy_coef != 0,
        _metrics={"train": grpo_trainer.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, entropies, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    trainer.get_high_entropy_mask = MethodType(GRPOTrainer.get_high_entropy_mask, trainer)
    ids = torch.zeros(B, 1, dtype=torch.int64)
    inputs = inputs | dict(prompt_ids=ids, prompt_mask=ids, completion_ids=inputs["completion_mask"].long())
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSSES = [
    *(dict(loss_type=name) for name in (*CLIPPED, "cispo", "sapo", "vespo")),
    *(dict(loss_type=name, importance_sampling_level="sequence") for name in (*CLIPPED, "cispo", "sapo")),
    *(dict(loss_type=name, beta=0.1) for name in ("dapo", "luspo", "cispo")),
    dict(beta=0.1, use_bias_correction_kl=False),
    dict(beta=0.1, importance_sampling_level="sequence", loss_type="grpo"),
    dict(epsilon=0.1, epsilon_high=0.3, delta=1.2),
    dict(loss_type="cispo", epsilon_high=1.1),
    dict(loss_type="sapo", sapo_temperature_pos=0.8, sapo_temperature_neg=1.4),
    dict(loss_type="vespo", vespo_k_pos=1.5, vespo_lambda_pos=0.0, vespo_k_neg=2.5, vespo_lambda_neg=1.5),
    dict(loss_type="dr_grpo", max_completion_length=T),
    dict(top_entropy_quantile=0.6, entropy_coef=0.05),
    dict(off_policy_mask_threshold=0.05),
]


def loss_inputs():
    logps, old, ref, sampler = (-2 * torch.rand(B, T) - 0.5 for _ in range(4))
    mask = torch.arange(T) < torch.tensor([T, 3, 1, 5])[:, None]
    old, ref, sampler = (logps + 0.3 * x.sub(x.mean()) for x in (old, ref, sampler))
    return logps.requires_grad_(), old, ref, sampler, mask, torch.tensor([1.2, -0.7, 0.4, -1.1])


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("on_policy", [False, True])
def test_loss(options, on_policy):
    logps, old, ref, _, mask, advantages = loss_inputs()
    entropies = (2 * torch.rand(B, T)).requires_grad_()
    items = mask.sum()
    theirs, metrics = trl_loss(
        logps,
        entropies,
        dict(completion_mask=mask.float(), advantages=advantages, ref_per_token_logps=ref, num_items_in_batch=items)
        | ({} if on_policy else dict(old_per_token_logps=old)),
        **options,
    )
    out = compat.grpo_loss(
        logps,
        advantages,
        mask,
        old_per_token_logps=None if on_policy else old,
        ref_per_token_logps=ref,
        entropies=entropies,
        **options,
    )
    compare([out.loss], [theirs], [logps, entropies] if "entropy_coef" in options else [logps], rtol=1e-5, atol=1e-6)
    if "beta" in options:
        assert_close(out.metrics["kl"].item(), metrics["kl"][0], rtol=1e-5, atol=1e-6)
    # TRL weighs sequences equally, and counts what `delta` has left of a ratio.
    if "clip_ratio/high_mean" in metrics and not {"importance_sampling_level", "delta"} & options.keys():
        for side in ("low", "high"):
            assert_close(out.metrics[f"clip_fraction_{side}"].item(), metrics[f"clip_ratio/{side}_mean"][0])


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", ["dapo", "luspo", "vespo"])
@pytest.mark.parametrize("lowest, highest", [(None, 3.0), (0.9, 1.05), (0.9, None)])
def test_loss_with_vllm_correction(mode, loss_type, lowest, highest):
    logps, old, ref, sampler, mask, advantages = loss_inputs()
    sampler[0, 1] = torch.nan  # vLLM could not score it
    bounds = dict(vllm_importance_sampling_clip_min=lowest, vllm_importance_sampling_clip_max=highest)
    options = dict(loss_type=loss_type, beta=0.1, off_policy_mask_threshold=0.0)
    call = dict(old_per_token_logps=old, ref_per_token_logps=ref, sampling_per_token_logps=sampler, **options, **bounds)
    if loss_type == "vespo" and mode.startswith("sequence"):
        with pytest.raises(ValueError, match="vllm_importance_sampling_mode"):
            compat.grpo_loss(logps, advantages, mask, vllm_importance_sampling_mode=mode, **call)
        return
    # As GRPOTrainer prepares it
    gap = ((old - sampler) * mask).nan_to_num(nan=0.0)
    rho = (gap.sum(1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    if mode.endswith("truncate"):
        rho = rho.clamp(lowest, highest)
    else:
        rho = rho.masked_fill((rho < (lowest or 0)) | (rho > (highest or torch.inf)), 0.0)
    theirs, _ = trl_loss(
        logps,
        torch.rand(B, T),
        dict(
            completion_mask=mask.float(), advantages=advantages, old_per_token_logps=old, ref_per_token_logps=ref,
            sampling_per_token_logps=sampler, importance_sampling_ratio=rho, num_items_in_batch=mask.sum(),
        ),
        use_vllm=True,
        **options,
    )  # fmt: skip
    out = compat.grpo_loss(logps, advantages, mask, vllm_importance_sampling_mode=mode, **call)
    compare([out.loss], [theirs], [logps], rtol=1e-5, atol=1e-6)


def test_loss_with_a_sampler_for_the_off_policy_mask_alone():
    logps, old, _, sampler, mask, advantages = loss_inputs()
    inputs = dict(completion_mask=mask.float(), advantages=advantages, old_per_token_logps=old)
    threshold = dict(off_policy_mask_threshold=0.0)
    theirs, _ = trl_loss(
        logps,
        torch.rand(B, T),
        inputs | dict(sampling_per_token_logps=sampler, num_items_in_batch=mask.sum()),
        use_vllm=True,
        vllm_importance_sampling_correction=False,
        **threshold,
    )
    out = compat.grpo_loss(
        logps, advantages, mask, old_per_token_logps=old, sampling_per_token_logps=sampler,
        vllm_importance_sampling_correction=False, **threshold,
    )  # fmt: skip
    compare([out.loss], [theirs], [logps], rtol=1e-5, atol=1e-6)


def test_loss_of_a_micro_batch_takes_its_share_of_the_batch():
    logps, old, _, _, mask, advantages = loss_inputs()
    for loss_type, changes in (("dapo", True), ("cispo", True), ("grpo", False), ("bnpo", False)):
        options = dict(old_per_token_logps=old, loss_type=loss_type)
        alone, share = (
            compat.grpo_loss(logps, advantages, mask, num_items_in_batch=n, **options).loss for n in (None, 60)
        )
        assert_close(share, alone * mask.sum() / 60 if changes else alone)


def test_loss_needs_what_its_options_use():
    logps, _, _, _, mask, advantages = loss_inputs()
    with pytest.raises(ValueError, match="ref_logprobs"):
        compat.grpo_loss(logps, advantages, mask, beta=0.1)
    with pytest.raises(ValueError, match="entropies"):
        compat.grpo_loss(logps, advantages, mask, top_entropy_quantile=0.5)
    with pytest.raises(ValueError, match="loss_type"):
        compat.grpo_loss(logps, advantages, mask, loss_type="ppo")


# The trainer


def tiny_model():
    config = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


def train(checkpoint, lora, **options):
    """Three steps: their losses, the trained weights, and how far these have moved."""
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    args = GRPOConfig(
        output_dir=str(checkpoint / "run"), max_steps=3, per_device_train_batch_size=8, num_generations=4,
        num_iterations=2, max_completion_length=8, learning_rate=0.3, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0.0, use_cpu=True, bf16=False, report_to="none", logging_steps=1, save_strategy="no",
        disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(checkpoint),
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w3 w1"]}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
        ),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=4) if lora else None,
    )
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = torch.cat([p.detach().flatten() for p in trained.values()])
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trained.values()])
    return [row for row in trainer.state.log_history if "loss" in row], after, (after - before).abs().max()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trainer(checkpoint, lora, monkeypatch):
    """Three steps with KL, clipping, an entropy mask and bonus: SGD's steps do not amplify rounding."""
    options = dict(beta=0.05, entropy_coef=0.01, top_entropy_quantile=0.8, temperature=0.9)
    theirs, expected, moved = train(checkpoint, lora, **options)
    calls, function = [], compat.ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        compat.ChunkedLogProbFunction, "apply", lambda *given: calls.append(given[-1]) or function(*given)
    )
    with compat.install():
        ours, weights, _ = train(checkpoint, lora, **options)
    assert len(calls) >= 6 and ("log_probs", "entropy") in calls
    assert moved > 1e-2
    assert min(row["completions/mean_length"] for row in theirs if "completions/mean_length" in row) < 8
    assert max(row["kl"] for row in theirs) > 0
    for name in ("loss", "kl", "entropy", "grad_norm"):
        assert_close([row[name] for row in ours], [row[name] for row in theirs], rtol=1e-6, atol=1e-6)
    assert_close(weights, expected, rtol=0, atol=3e-6 * moved.item())


def test_install_is_undone():
    names = "_ChunkedLogProbFunction", "add_fused_lm_head"
    before = [getattr(utils, name) for name in names] + [grpo_trainer.add_fused_lm_head]
    handle = compat.install()
    assert utils._ChunkedLogProbFunction is compat.ChunkedLogProbFunction
    assert grpo_trainer.add_fused_lm_head is utils.add_fused_lm_head is not before[1]
    with compat.install():
        pass
    assert utils._ChunkedLogProbFunction is not before[0]
    handle.close()
    assert [getattr(utils, name) for name in names] + [grpo_trainer.add_fused_lm_head] == before
    handle.close()
    assert utils._ChunkedLogProbFunction is before[0]


def test_install_needs_trls_names(monkeypatch):
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(RuntimeError, match="_ChunkedLogProbFunction"):
        compat.install()


def fused(model):
    ids = torch.randint(3, len(WORDS), (2, 7), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids, fused_lm_head=True)


def test_trainers_that_ask_for_more_raise_until_undone():
    model = tiny_model()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer does
    with compat.install(), pytest.raises(NotImplementedError, match=r"is_top1.*undo install"):
        fused(model)
    assert fused(model).is_top1 is not None


def test_a_wrapped_head_raises():
    config = dict(r=4, init_lora_weights=False)
    with compat.install():
        model = tiny_model()
        utils.add_fused_lm_head(model)
        assert arguments(model.forward) == arguments(tiny_model().forward)
        plain = fused(model).log_probs
        adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"], **config))
        with pytest.raises(NotImplementedError, match=r"peft.*target_modules.*modules_to_save"):
            fused(adapted)
        assert adapted(input_ids=torch.ones(1, 2, dtype=torch.int64)).logits.shape == (1, 2, len(WORDS))

        model = tiny_model()
        utils.add_fused_lm_head(model)
        saved = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **config))
        copy = saved.get_output_embeddings().modules_to_save["default"].weight
        grads = torch.autograd.grad(fused(saved).log_probs.sum(), copy)
    theirs = torch.autograd.grad(fused(saved).log_probs.sum(), copy)
    assert_close(grads, theirs, rtol=1e-5, atol=1e-5)
    assert plain.shape == (2, 6)
