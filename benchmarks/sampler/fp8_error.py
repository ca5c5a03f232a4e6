"""How exact products in e4m3 are, next to bf16's: against fp64, at full width, without a GPU.

    python -m benchmarks.sampler.fp8_error     # writes results/fp8-error.jsonl and prints its tables, in a minute

The products are those of one block of SD3.5-medium (with dual attention) and of SD3.5-large with random weights, their
inputs what the block gives them: LayerNorm's outputs with modulations of which one channel in a hundred scales by 20,
attention's and GELU's outputs. Numbers in e4m3 are emulated on the CPU: quantised as on a GPU, multiplied in fp32. And
the velocity of the small decoder that ships with uae-fast, with its real weights, over its schedule.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from uae_kernels.mmdit import Quantized, fp8_linear, quantize_rows
from uae_kernels.mmdit.products import LAYERS, STATIC, at

from ..rows import RESULTS, Row, environment

NAME = "fp8-error"
HEADS = {"medium": 24, "large": 38}
IMAGE, TEXT, MEASURED = 256, 77, 64  # tokens, and those of them that are measured
OUTLIERS, SIZE = 100, 19.0  # one channel in so many, scaled by 1 + SIZE
MARGIN = 1.5  # of static scales


def inputs_and_layers(model: str) -> Iterator[tuple[str, Tensor, list[nn.Linear]]]:
    """Of each product of a block: its name, input (N, C), and linear layers."""
    from diffusers.models.attention import JointTransformerBlock

    torch.manual_seed(0)
    width = 64 * HEADS[model]
    block = JointTransformerBlock(
        width, HEADS[model], 64, qk_norm="rms_norm", use_dual_attention=model == "medium"
    ).eval()
    for norm, shares in ((block.norm1, 9 if model == "medium" else 6), (block.norm1_context, 6)):
        scales = norm.linear.bias.data.view(shares, width)
        for share in (1, 4, 7)[: shares // 3]:
            scales[share, torch.randperm(width)[: width // OUTLIERS]] += SIZE
    layers = {name: [at(block, path) for path in paths] for name, paths in LAYERS.items()}
    seen: dict[str, Tensor] = {}
    for name, (first, *_) in layers.items():
        if first is not None:
            first.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    block(torch.randn(1, IMAGE, width), torch.randn(1, TEXT, width), temb=torch.randn(1, width))
    for name, x in seen.items():
        yield name, x[0, :MEASURED], layers[name]


def product_row(model: str, name: str, x: Tensor, layers: list[nn.Linear]) -> Row:
    """Relative errors of one product of inputs and weights in bf16."""
    x = x.bfloat16()
    weight, bias = (torch.cat([getattr(layer, part) for layer in layers]).bfloat16() for part in ("weight", "bias"))
    exact = x.double() @ weight.double().t() + bias.double()

    def error(out: Tensor) -> float:
        return ((out.double() - exact).norm() / exact.norm()).item()

    def in_fp8(rows: Quantized) -> float:
        return error(fp8_linear(rows, quantize_rows(weight), bias))

    static = in_fp8(quantize_rows(x, scale=MARGIN * x.abs().amax().float() / 448)) if name in STATIC else None
    return {
        "model": model,
        "product": name,
        "shape": [len(x), *weight.shape[::-1]],
        "bf16": error(nn.functional.linear(x, weight, bias)),
        "fp8": in_fp8(quantize_rows(x)),
        "fp8_static": static,
    }


def velocity_rows() -> Iterator[Row]:
    """Relative errors of the small decoder's velocity at each level of its schedule, in fp32, bf16 and fp8."""
    from uae_fast.config import load_config
    from uae_fast.models.loading import load_models
    from uae_fast.rollout.renders import draw, initial_noise

    captions = [
        f"a {colour} {shape}" for colour in ("red", "blue", "green", "yellow") for shape in ("circle", "square")
    ]
    seeds = list(range(len(captions)))
    found: dict[str, list[Tensor]] = {}
    # fp32, bf16's own error, and fp8 with a scale a token and with calibrated ones
    for kind, options in {
        "exact": [],
        "bf16": ["models.dtype=bfloat16", "models.decoder=lora"],
        "fp8": ["same_sampler.fp8=true"],
        "fp8_static": ["same_sampler.fp8=true"],
    }.items():
        config = load_config("tiny", ["device=cpu", f"render.batch={len(captions)}", *options])
        decoder = (models := load_models(config)).decoder
        decoder.fp8_calibrates = kind == "fp8_static"
        if kind == "fp8_static":
            draw(config, models, captions, seeds)
        with torch.no_grad():
            if kind == "exact":
                context = models.condition(captions)
                noise = initial_noise(seeds, decoder.latent_shape(config.data.resolution), decoder.device)
                sigmas, path = decoder.sigmas(config.render.steps), [noise]
                for sigma, after in pairwise(sigmas[:-1]):
                    path.append(path[-1] + (after - sigma) * decoder.velocity(path[-1], sigma, context))
            levels = decoder.sigmas(config.render.steps)[:-1]
            found[kind] = [
                decoder.velocity(x, sigma, context.to(decoder.dtype)).double()
                for x, sigma in zip(path, levels, strict=True)
            ]
    for i, exact in enumerate(found["exact"]):
        errors = {kind: ((found[kind][i] - exact).norm() / exact.norm()).item() for kind in list(found)[1:]}
        yield {"model": "tiny", "product": "velocity", "sigma": sigmas[i].item(), **errors}


def tables(rows: list[Row]) -> str:
    """Two tables in Markdown."""
    models = list(HEADS)
    by_name = {(row["model"], row["product"]): row for row in rows}
    head = [f"{model}: {kind}" for model in models for kind in ("bf16", "fp8", "fp8 static")]
    lines = [f"| product | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for name in LAYERS:
        cells = []
        for model in models:
            row = by_name.get((model, name), {})
            cells += [f"{row[key]:.2%}" if row.get(key) else "" for key in ("bf16", "fp8", "fp8_static")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| tiny decoder's velocity at σ | bf16 | fp8 | fp8 static |", "|---|---|---|---|"]
    for row in rows:
        if row["product"] == "velocity":
            lines.append(f"| {row['sigma']:.3f} | {row['bf16']:.2%} | {row['fp8']:.2%} | {row['fp8_static']:.2%} |")
    return "\n".join(lines)


def main() -> None:
    where = environment("cpu")
    kept = {key: where[key] for key in ("commit", "dirty", "date", "versions", "python")}
    with torch.no_grad():
        rows = [product_row(model, *given) for model in HEADS for given in inputs_and_layers(model)]
    rows += velocity_rows()
    written = [{"op": "fp8_error", "kind": "emulated on a CPU", **row, **kept} for row in rows]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{NAME}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    print(tables(rows))


if __name__ == "__main__":
    main()
