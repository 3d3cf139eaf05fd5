import json
import re
import resource
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vlm3d_ext.engines.gpu_rates import EFFICIENCY, gpu_rates
from vlm3d_ext.engines.meta_execution import MetaExecution
from vlm3d_ext.engines.operation_meter import OperationMeter, Work
from vlm3d_ext.engines.training_requirements import main, training_requirements
from vlm3d_ext.engines.training_runs import RUNS, load_run
from vlm3d_ext.engines.training_step_cost import encoder_bytes_per_token, measure_training_step, run_step
from vlm3d_ext.networks.blocks import DenoisingTransformer
from vlm3d_ext.networks.layers import ResidualLayerNorm
from vlm3d_ext.networks.nets import LesionLocalizationModule, ThreeDVisionEncoder

SMALL: dict[str, Any] = {
    "patch_size": [2, 4, 4], "hidden_size": 48, "num_layers": 2, "num_heads": 4, "num_depth_heads": 1, "mlp_dim": 96,
    "batch_size": 2,
}  # fmt: skip
VOLUME = (8, 12, 16)
LOCALIZER = {
    **SMALL, "denoising_layers": 1, "denoising_mlp_dim": 64, "stem_channels": 4, "base_channels": 8,
    "stem_stride": [1, 2, 2], "level_strides": [[2, 2, 2], [2, 2, 2]], "crop_size": [4, 8, 8], "text_hidden_size": 64,
    "max_noise": 0.5,
}  # fmt: skip
TINY_LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    return {
        **SMALL, "language_model": str(folder), "lora_rank": 4, "num_queries": 8, "projector_layers": 1,
        "projector_heads": 4, "max_prompt_tokens": 12, "max_report_tokens": 10,
    }  # fmt: skip


def forward_and_meter(network, inputs, context):
    """Run a network forward; return the meter, what it gave, and bytes that autograd was given to save."""
    given = [*network.parameters(), *network.buffers(), *inputs]
    known = {part.untyped_storage()._cdata for part in given}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    meter = OperationMeter(given)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context, meter:
        result = network(*inputs)
    if isinstance(context, MetaExecution):
        context.end_forward()
    return meter, result, sum(saved.values())


def small_encoder(device):
    torch.manual_seed(0)
    knobs = {name: value for name, value in SMALL.items() if name != "batch_size"}
    with torch.device(device):
        return ThreeDVisionEncoder(**knobs), [torch.rand(2, 1, *VOLUME)]


class DrawsCrops(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        return self.network.logits_and_denoising(image, None, None, torch.zeros(2, 1, 3, dtype=torch.int64), (4, 8, 8))


def small_localizer(device):
    config = load_run("localization", LOCALIZER, VOLUME).config
    config.parse(True)
    torch.manual_seed(0)
    with torch.device(device):
        network = config.get_parsed_content("network_def")
        assert isinstance(network, LesionLocalizationModule)
        return DrawsCrops(network).train(), [torch.rand(2, 1, *VOLUME)]


@pytest.mark.parametrize("make", [small_encoder, small_localizer])
def test_meta_tensors_keep_what_real_ones_do(make):
    counted = {}
    for device, context in (("cpu", torch.autocast("cpu", torch.bfloat16)), ("meta", MetaExecution("cpu"))):
        network, inputs = make(device)
        meter, result, saved = forward_and_meter(network, inputs, context)
        counted[device] = meter.live_bytes, saved, sum(p.numel() for p in network.parameters())
        # the denoising transformer begins with one more, a function without weights
        norms = (ResidualLayerNorm, DenoisingTransformer)
        num_norms = sum(isinstance(module, norms) for module in network.modules())
        del result
    # mean and deviation of a token: the processor's kernel keeps them in the type of the tokens, no other does
    of_norms = 2 * num_norms * (2 * 4 * 3 * 4) * (4 - 2)
    live, saved, num_parameters = counted["cpu"]
    assert counted["meta"] == (live + of_norms, saved + of_norms, num_parameters)
    assert saved > 100_000


def test_kept_bytes_are_what_autograd_saves_and_what_is_returned():
    network, inputs = small_encoder("cpu")
    given = {part.untyped_storage()._cdata for part in [*network.parameters(), *network.buffers(), *inputs]}
    meter, result, saved = forward_and_meter(network, inputs, torch.autocast("cpu", torch.bfloat16))
    returned = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in result if t is not None}
    assert saved <= meter.live_bytes <= saved + sum(size for key, size in returned.items() if key not in given)


def test_memory_is_counted_from_birth_to_death():
    with OperationMeter() as meter:
        kept = torch.ones(100)
        passing = torch.ones(1000)
        view = passing.view(10, 100)
        assert meter.live_bytes == 4400
        del passing
        assert meter.live_bytes == 4400  # the view holds it
        del view
        assert meter.live_bytes == 400
        kept += 1
    assert (meter.live_bytes, meter.peak_bytes) == (400, 4400)
    # two fillings, a view that moves nothing, and an addition that reads and writes
    assert meter.work().bytes_moved == 400 + 4000 + 2 * 400


def test_flops_and_bytes_of_a_product_and_of_a_look_up():
    with OperationMeter() as meter:
        torch.empty(3, 5, device="meta") @ torch.empty(5, 7, device="meta")
        work = meter.work()
        F.embedding(torch.zeros(2, dtype=torch.int64, device="meta"), torch.empty(1000, 4, device="meta"))
    assert (work.flops, work.bytes_moved) == (2 * 3 * 5 * 7, 4 * (15 + 35 + 21))
    assert work.seconds(210, 1e9) == pytest.approx(1.0) and work.seconds(1e9, 71) == pytest.approx(4.0)
    assert meter.work().bytes_moved < 4 * 1000 * 4


def test_operations_are_those_of_torchs_own_counter():
    network, inputs = small_encoder("meta")
    with MetaExecution() as execution, FlopCounterMode(display=False) as counter, OperationMeter() as meter:
        execution.backward(network(*inputs).global_features.sum())
    assert meter.work().flops == counter.get_total_flops() > 0


def test_attention_is_counted_and_does_not_keep_its_matrices():
    q = torch.empty(2, 3, 256, 8, device="meta", requires_grad=True)
    for mask in (None, torch.ones(2, 1, 1, 256, dtype=torch.bool, device="meta")):
        with MetaExecution() as execution, OperationMeter([q]) as meter:
            result = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
            execution.end_forward()
            assert meter.work().flops == 4 * 2 * 3 * 256**2 * 8
            assert result.dtype is torch.bfloat16 and meter.live_bytes < 2 * 3 * 256**2
            execution.backward(result.sum().float())
        # five products in place of two: the kernel computes the scores again
        assert meter.work().flops == 10 * 2 * 3 * 256**2 * 8


# what this package's networks and the language models call, of one tensor (2, 3, 8) and a weight (8, 8)
CALLS = {
    "linear": lambda x, w: F.linear(x, w),
    "product": lambda x, w: x @ w,
    "einsum": lambda x, w: torch.einsum("bnc,cd->bnd", x, w),
    "conv3d": lambda x, w: F.conv3d(x[:, None, None], w[:, :1, None, None, None]),
    "layer_norm": lambda x, w: F.layer_norm(x, (8,), w[0], w[0]),
    "softmax": lambda x, w: x.softmax(-1),
    "log_softmax": lambda x, w: F.log_softmax(x, -1),
    "normalize": lambda x, w: F.normalize(x, dim=-1),
    "power": lambda x, w: x**2,
    "square": lambda x, w: x.square(),
    "exp": lambda x, w: x.exp(),
    "rsqrt": lambda x, w: torch.rsqrt(x),
    "sum": lambda x, w: x.sum(-1),
    "mean": lambda x, w: x.mean(-1),
    "logsumexp": lambda x, w: x.logsumexp(-1),
    "sigmoid": lambda x, w: x.sigmoid(),
    "logsigmoid": lambda x, w: F.logsigmoid(x),
    "gelu": lambda x, w: F.gelu(x),
    "interpolate": lambda x, w: F.interpolate(x[:, :, None, None], size=(1, 1, 16), mode="trilinear"),
    "cat": lambda x, w: torch.cat([x, x]),
    "embedding": lambda x, w: F.embedding(torch.zeros(2, dtype=torch.int64, device=x.device), w),
}


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch that knows CUDA")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_those_of_autocast_on_cuda(call, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def result(device):
        return CALLS[call](torch.empty(2, 3, 8, dtype=dtype, device=device), torch.empty(8, 8, device=device)).dtype

    with MetaExecution("cuda"):
        ours = result("meta")
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            assert ours is result("cuda")
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def test_execution_answers_about_autocast_only_within_and_only_about_meta():
    with MetaExecution() as execution:
        assert torch.is_autocast_enabled("meta") and not torch.is_autocast_enabled("cpu")
        with torch.autocast("meta", enabled=False):
            assert not torch.is_autocast_enabled("meta")
            assert (torch.empty(2, 2, device="meta") @ torch.empty(2, 2, device="meta")).dtype is torch.float32
        assert execution.half
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.is_autocast_enabled("cpu") and torch.amp.is_autocast_available("meta")
    with pytest.raises(RuntimeError):
        torch.is_autocast_enabled("meta")
    with pytest.raises(ValueError, match=r"device must be one of .*, got 'tpu'"):
        MetaExecution("tpu")


def test_a_mask_selects_the_share_it_is_told():
    with MetaExecution(selected_share=0.4):
        mask = torch.ones(2, 50, dtype=torch.bool, device="meta")
        assert torch.empty(2, 50, 3, device="meta")[mask].shape == (40, 3)


@pytest.mark.parametrize(("run", "checkpointing"), [("align", True), ("rl", False), ("joint", True)])
def test_layers_of_the_language_model_add_up(run, checkpointing, tiny_language_model):
    options = {**tiny_language_model, "gradient_checkpointing": checkpointing}
    if run == "joint":
        options |= {**LOCALIZER, "text_hidden_size": 64}
    extrapolated = measure_training_step(run, options, VOLUME)
    counted = run_step(load_run(run, options, VOLUME))
    assert counted.num_layers == 6
    for name in ("trained_parameters", "frozen_parameters", "weight_bytes", "kept_bytes", "layer_bytes"):
        assert getattr(extrapolated, name) == pytest.approx(getattr(counted, name)), name
    assert extrapolated.peak_bytes == pytest.approx(counted.peak_bytes, rel=0.05)
    for phase, work in counted.phases.items():
        assert extrapolated.phases[phase].flops == pytest.approx(work.flops), phase
        assert extrapolated.phases[phase].bytes_moved == pytest.approx(work.bytes_moved), phase


def test_checkpointing_keeps_less_and_computes_more():
    none, selective, full = (
        measure_training_step("encoder", {**SMALL, "activation_checkpointing": mode}, VOLUME)
        for mode in ("none", "selective", "full")
    )
    assert none.kept_bytes > selective.kept_bytes > full.kept_bytes
    forward = none.phases["forward"].flops
    assert none.phases["backward"].flops == selective.phases["backward"].flops < full.phases["backward"].flops
    assert full.phases["backward"].flops - none.phases["backward"].flops < forward
    assert none.trained_parameters == full.trained_parameters and none.frozen_parameters == 0


def test_frozen_encoder_has_no_backward_pass():
    options = {**SMALL, "text_hidden_size": 64}
    frozen, trained = (
        measure_training_step("classification", {**options, "train_encoder": on}, VOLUME) for on in (False, True)
    )
    features = measure_training_step("from_features", options, VOLUME)
    assert frozen.phases["backward"].flops == features.phases["backward"].flops
    assert frozen.kept_bytes < trained.kept_bytes
    encoder = small_encoder("cpu")[0]
    unused = [encoder.mask_token, *encoder.region_classifier.parameters()]
    num_learning = sum(weight.numel() for weight in encoder.parameters()) - sum(weight.numel() for weight in unused)
    assert trained.trained_parameters - frozen.trained_parameters == num_learning
    assert frozen.frozen_parameters - trained.frozen_parameters == num_learning


def test_parameters_are_those_of_real_networks(tiny_language_model):
    from transformers import LlamaConfig, LlamaForCausalLM

    run = load_run("encoder", SMALL, VOLUME)
    real = run.config
    real.parse(True)
    trainable = real.get_parsed_content("trainable")
    cost = run_step(run)
    assert cost.trained_parameters == sum(weight.numel() for weight in trainable.parameters())
    assert cost.weight_bytes == sum(
        part.numel() * part.element_size() for part in [*trainable.parameters(), *trainable.buffers()]
    )
    language_model = LlamaForCausalLM(LlamaConfig.from_dict(TINY_LLAMA))
    align = measure_training_step("align", tiny_language_model, VOLUME)
    assert align.frozen_parameters == sum(weight.numel() for weight in language_model.parameters())


def test_full_size_encoder_costs_what_is_known_of_it():
    cost = run_step(load_run("encoder", {"batch_size": 2}))
    # head-split attention, 3.3 TFLOP forward for each volume; what the heads of pre-training add is little
    assert cost.phases["forward"].flops / 2 == pytest.approx(3.3e12, rel=0.03)
    assert cost.phases["backward"].flops / cost.phases["forward"].flops == pytest.approx(2, rel=0.1)
    assert 85e6 < cost.trained_parameters < 95e6
    per_token = {mode: encoder_bytes_per_token({"activation_checkpointing": mode}) for mode in ("selective", "full")}
    assert per_token["full"] == pytest.approx(2.0, abs=0.05) and per_token["selective"] <= 22
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 * 2**20  # KiB


def test_rates_are_measured_or_said_not_to_be():
    measured, others = gpu_rates("h200"), gpu_rates("h100")
    assert (measured.tflops, measured.tb_per_s) == pytest.approx((790, 4.3))
    assert others.tflops == pytest.approx(790) and others.tb_per_s == pytest.approx(3.35 * 4.3 / 4.8)
    assert measured.source.startswith("measured") and others.source.startswith("not measured")
    assert gpu_rates("h100", 100, 1).source == "as given"
    assert measured.usable_bytes == 0.9 * 139 * 2**30
    with pytest.raises(ValueError, match=r"gpu must be one of .*h200.*, got 'h300'"):
        gpu_rates("h300")
    with pytest.raises(ValueError, match="tflops of a GPU must be positive, got -1"):
        gpu_rates("h100", -1)


def test_times_and_memory_follow_from_what_is_counted():
    gpu = gpu_rates("h100", 1e-3, 1e-3, memory_gib=1)
    options = {**SMALL, "global_batch_size": 8}
    cost = measure_training_step("encoder", {**options, "activation_checkpointing": "full"}, VOLUME)
    row = training_requirements("encoder", gpu, 2, None, options, VOLUME)
    full = row["variants"][2]
    assert row["accumulation_steps"] == 2 and [variant["is_shipped"] for variant in row["variants"]].count(True) == 1
    assert full["total_gib"] * 2**30 == pytest.approx(
        cost.weight_bytes + 3 * cost.trained_bytes + cost.batch_bytes + cost.peak_bytes
    )
    micro, step = full["micro_batch"], full["optimizer_step"]
    work = cost.phases["forward"].plus(cost.phases["backward"])
    assert micro["floor_ms"] == pytest.approx(max(work.flops, work.bytes_moved) / 1e6)
    assert micro["expected_ms"] == pytest.approx(micro["in_turn_ms"] / EFFICIENCY) and full["fits"]
    assert micro["floor_ms"] <= micro["in_turn_ms"] <= (work.flops + work.bytes_moved) / 1e6
    optimizer = 1e3 * 40 * cost.trained_parameters / 1e9 / EFFICIENCY
    assert step["expected_ms"] == pytest.approx(2 * micro["expected_ms"] + optimizer)


def test_what_does_not_fit_is_told_what_would(tiny_language_model):
    options = {**tiny_language_model, "max_report_tokens": 200}
    none, checkpointed = (
        measure_training_step("align", {**options, "gradient_checkpointing": on}, VOLUME).total_bytes
        for on in (False, True)
    )
    gpu = gpu_rates("h100", memory_gib=(none + checkpointed) / 2 / 0.9 / 2**30)
    row = training_requirements("align", gpu, 1, None, options, VOLUME)
    assert [variant["fits"] for variant in row["variants"]] == [False, True]
    assert row["advice"][0].startswith("fits with --gradient_checkpointing True: ")
    tiny = training_requirements(
        "encoder", gpu_rates("h100", memory_gib=1e-6), 1, None, {**SMALL, "activation_checkpointing": "full"}, VOLUME
    )
    assert tiny["advice"] == ["nothing of what there is to change makes it fit h100; take one with more memory"]


def test_four_bits_and_shards_take_less(tiny_language_model):
    gpu = gpu_rates("h200")
    whole, sharded = (
        training_requirements("align", gpu, number, None, tiny_language_model, VOLUME)["variants"][0]
        for number in (1, 4)
    )
    four_bit = training_requirements("align", gpu, 1, None, {**tiny_language_model, "quantization": "nf4"}, VOLUME)
    layers = 6 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 64) * 2
    assert whole["sharded_total_gib"] is None
    # three quarters of the layers are elsewhere, three of six are gathered
    assert (sharded["sharded_total_gib"] - sharded["total_gib"]) * 2**30 == pytest.approx(-layers * 3 / 4 + layers / 2)
    assert four_bit["variants"][0]["total_gib"] == pytest.approx(whole["four_bit_total_gib"])
    assert whole["four_bit_total_gib"] < whole["total_gib"]


def test_command_prints_tables_and_json(capsys):
    arguments = ["--run", "encoder", "--volume-size", "8", "12", "16", "--gpu", "rtx4090"]
    arguments += [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "* activation selective" in table and "times what an H200 was measured" in table
    assert "bytes kept per token, layer and channel: none" in table
    assert main([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["runs"][0]["batch_size"] == 2 and content["runs"][0]["volume_size"] == [8, 12, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "segmentation"], "run must be one of encoder, .* got 'segmentation'"),
        (["--run", "encoder", "--batch_sise", "4"], "--batch_sise would have no effect: .* --batch_size"),
        (["--run", "encoder", "--batch_size"], "expected --name value"),
        (["--run", "encoder", "--gpus", "0"], "gpus must be from 1 to 64, got 0"),
        (["--run", "align", "--llm", "gpt"], "llm must be one of gemma_2_27b, llama_3_1_70b, llama_3_1_8b"),
        (["--run", "align", "--language_model", "nobody/knows"], "'nobody/knows' is no folder, and its architecture"),
        (["--run", "encoder", "--bundles", "nowhere"], "train.json: there is no such config"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert re.search(message, captured.err), captured.err


def test_work_adds_up():
    one, two = Work({(2.0, 3.0): 1}), Work({(2.0, 3.0): 1, (0.0, 5.0): 2})
    assert one.plus(two, 2).operations == {(2.0, 3.0): 3, (0.0, 5.0): 4}
    assert one.plus(one, -1).operations == {} and two.times(0.5).bytes_moved == 6.5
    assert set(RUNS) == {"encoder", "classification", "from_features", "localization", "align", "rl", "joint"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_estimate_is_near_what_the_gpu_takes(mode):
    options = {"batch_size": 1, "num_layers": 6, "activation_checkpointing": mode}
    run = load_run("encoder", options)
    cost = run_step(run)
    config = load_run("encoder", options).config
    config.parse(True)
    trainable = config.get_parsed_content("trainable").cuda().train()
    batch = {name: torch.zeros(value.shape, dtype=value.dtype, device="cuda") for name, value in run.batch.items()}
    batch["patch_mask"].view(-1)[: round(run.knob("mask_ratio") * batch["patch_mask"].numel())] = True
    optimizer = torch.optim.AdamW(trainable.parameters(), fused=True)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        start.record()
        with torch.autocast("cuda", torch.bfloat16):
            loss = run.loss(trainable(**batch))
        loss.backward()
        end.record()
        peak = torch.cuda.max_memory_allocated()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    torch.cuda.synchronize()
    seconds = sum(work.seconds(790e12, 4.3e12) for work in cost.phases.values())
    print(f"{mode}: {peak / 2**30:.2f} GiB, estimated {cost.total_bytes / 2**30:.2f}; "
          f"{start.elapsed_time(end):.1f} ms, in turn on an H200 {1e3 * seconds:.1f}")  # fmt: skip
    assert cost.total_bytes == pytest.approx(peak, rel=0.2)
