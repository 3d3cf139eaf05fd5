import dataclasses
import json
import resource
import time

import pytest
import torch

from vlm3d_ext.engines.language_model_memory import (
    LORA_TARGETS,
    NF4_BITS,
    LanguageModelSize,
    PhaseMemory,
    Workload,
    estimate_phase,
    measure_language_model,
)
from vlm3d_ext.engines.language_model_requirements import (
    available_language_models,
    language_model_requirements,
    load_architecture,
    main,
)

GIB = 2**30
# hidden, intermediate, layers, width of all heads, width of key-value heads, designed rank, base parameters
PUBLISHED = {
    "llama_3_1_70b": (8192, 28672, 80, 8192, 1024, 64, 70_553_706_496),
    "gemma_2_27b": (4608, 36864, 46, 4096, 2048, 64, 27_227_128_320),
    "llama_3_1_8b": (4096, 14336, 32, 4096, 1024, 32, 8_030_261_248),
}


def linear_in_and_out(configuration):
    hidden, intermediate, _, heads, key_values, *_ = PUBLISHED[configuration]
    feed_forward = 3 * [(hidden, intermediate)]
    return [(hidden, heads), (hidden, key_values), (hidden, key_values), (heads, hidden), *feed_forward]


@pytest.fixture(scope="module")
def sizes():
    return {name: measure_language_model(load_architecture(name)[1], PUBLISHED[name][5]) for name in PUBLISHED}


def test_the_shipped_configurations_are_the_published_models():
    assert available_language_models() == sorted(PUBLISHED)
    names = {configuration: load_architecture(configuration)[0] for configuration in PUBLISHED}
    assert names == {
        "llama_3_1_70b": "meta-llama/Llama-3.1-70B-Instruct",
        "gemma_2_27b": "google/gemma-2-27b-it",
        "llama_3_1_8b": "meta-llama/Llama-3.1-8B-Instruct",
    }


@pytest.mark.parametrize("configuration", PUBLISHED)
def test_parameters_are_those_of_the_published_models(sizes, configuration):
    size = sizes[configuration]
    layers, rank, base = PUBLISHED[configuration][2], *PUBLISHED[configuration][5:]
    assert size.base_parameters == base
    shapes = linear_in_and_out(configuration)
    assert size.quantized_parameters == layers * sum(inputs * outputs for inputs, outputs in shapes)
    assert size.lora_parameters == layers * rank * sum(inputs + outputs for inputs, outputs in shapes)


def test_what_is_neither_linear_nor_adapter_is_embeddings_head_and_norms(sizes):
    llama, gemma = sizes["llama_3_1_8b"], sizes["gemma_2_27b"]
    assert llama.base_parameters - llama.quantized_parameters == 2 * 128256 * 4096 + (2 * 32 + 1) * 4096
    assert gemma.base_parameters - gemma.quantized_parameters == 256000 * 4608 + (4 * 46 + 1) * 4608
    assert (llama.norms_per_layer, gemma.norms_per_layer) == (2, 4)
    # layers are all but embeddings, head and last norm, and all alike
    assert llama.layer_parameters == llama.base_parameters - (2 * 128256 + 1) * 4096 == 32 * llama.largest_layer
    assert gemma.layer_parameters == gemma.base_parameters - (256000 + 1) * 4608 == 46 * gemma.largest_layer
    assert gemma.cache_windows == 23 * (4096, None) and gemma.is_eager
    assert llama.cache_windows == 32 * (None,) and not llama.is_eager


def test_the_largest_model_is_counted_in_seconds_and_without_memory():
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    measure_language_model(load_architecture("llama_3_1_70b")[1], 64)
    assert time.perf_counter() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB; its weights are 131 GiB


def test_adapters_grow_with_their_rank(sizes):
    config = load_architecture("llama_3_1_8b")[1]
    once = measure_language_model(config, 1)
    assert sizes["llama_3_1_8b"].lora_parameters == 32 * once.lora_parameters == 83_886_080
    with pytest.raises(ValueError, match="lora_rank must be at least 1, got 0"):
        measure_language_model(config, 0)


# small enough to reckon by hand: one windowed and one full layer
SMALL = LanguageModelSize(
    base_parameters=3000,
    quantized_parameters=2048,
    lora_parameters=100,
    lora_rank=2,
    layer_parameters=2200,
    largest_layer=1200,
    hidden_size=8,
    intermediate_size=20,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=3,
    vocab_size=11,
    norms_per_layer=2,
    cache_windows=(5, None),
    is_eager=False,
)
WORK = Workload(batch_size=3, num_samples=2, prompt_tokens=4, max_new_tokens=6)
# per token: 2 norms of 8 x 6 bytes; 2 x (4 + 2) x 3 attended and 4 x 20 gated values of 2 bytes; and in float32 the
# inputs of q, k, v, gate and up (8 each), o (12), down (20) and 7 x 2 inner values, in place of 8 + 8 + 20 of 2 bytes
LAYER = 2 * 8 * 6 + (36 + 80) * 2 + (5 * 8 + 12 + 20 + 14) * 4 - (8 + 8 + 20) * 2
LAYER_OF_BFLOAT16_ADAPTERS = 2 * 8 * 6 + (36 + 80 + 14) * 2
LOGITS = 11 * 10


def test_nf4_takes_4_127_bits_and_the_rest_stays_in_two_bytes():
    assert pytest.approx(4.127, abs=1e-3) == NF4_BITS
    assert estimate_phase(SMALL, WORK, "align", "bf16").weights == 6000
    assert estimate_phase(SMALL, WORK, "align", "nf4").weights == 2048 * NF4_BITS / 8 + 952 * 2


def test_nf4_bits_are_what_bitsandbytes_stores():
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(512, 1024), quant_type="nf4", compress_statistics=True)
    stored = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert stored * 8 / (512 * 1024) == NF4_BITS


def test_trained_state_is_counted_in_the_type_asked_for():
    with_projector = dataclasses.replace(WORK, projector_parameters=50)
    half = dataclasses.replace(with_projector, adapter_dtype="bfloat16")
    assert estimate_phase(SMALL, WORK, "rl", "bf16").trained == 100 * (4 + 4 + 8)
    assert estimate_phase(SMALL, with_projector, "align", "bf16").trained == 1600 + 50 * 16
    assert estimate_phase(SMALL, with_projector, "rl", "bf16").trained == 1600 + 50 * 4
    assert estimate_phase(SMALL, half, "rl", "bf16").trained == 100 * (2 + 2 + 4) + 50 * 4


def test_the_cache_holds_keys_and_values_of_every_sample_up_to_the_window():
    assert estimate_phase(SMALL, WORK, "align", "bf16").kv_cache == 0
    assert estimate_phase(SMALL, WORK, "rl", "bf16").kv_cache == 3 * 2 * (2 * (5 + 10) * 2 * 3 * 2)


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all():
    sequence = 10 * (2 * LAYER + LOGITS)
    checkpointed = 10 * (LAYER + 2 * 8 * 2 + LOGITS)
    assert estimate_phase(SMALL, WORK, "align", "bf16", False).activations == 3 * sequence
    assert estimate_phase(SMALL, WORK, "align", "bf16", True).activations == 3 * checkpointed
    assert estimate_phase(SMALL, WORK, "rl", "nf4", True).activations == 2 * 3 * checkpointed
    half = dataclasses.replace(WORK, adapter_dtype="bfloat16")
    assert estimate_phase(SMALL, half, "align", "bf16", False).activations == 3 * 10 * (
        2 * LAYER_OF_BFLOAT16_ADAPTERS + LOGITS
    )
    eager = dataclasses.replace(SMALL, is_eager=True)
    more = estimate_phase(eager, WORK, "align", "bf16", False).activations - 3 * sequence
    assert more == 3 * 2 * 10 * (4 * 10 * 8)


@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_the_formula_for_activations_is_near_what_autograd_keeps(model_type, adapter_dtype):
    """Of a layer, as the difference between models of two and four layers."""
    config = {
        "model_type": model_type,
        "vocab_size": 50,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
    }
    kept, predicted = [], []
    for num_layers in (2, 4):
        settings = {**config, "num_hidden_layers": num_layers}
        size = measure_language_model(settings, 4)
        work = Workload(batch_size=2, prompt_tokens=30, max_new_tokens=34, adapter_dtype=adapter_dtype)
        predicted.append(estimate_phase(size, work, "align", "bf16", False).activations)
        kept.append(bytes_kept_for_backward(settings, 4, (2, 64), adapter_dtype))
    assert (kept[1] - kept[0]) / (predicted[1] - predicted[0]) == pytest.approx(1, abs=0.1)


def bytes_kept_for_backward(config, rank, shape, adapter_dtype):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    attention = "eager" if config["model_type"] == "gemma2" else "sdpa"  # as load_language_model chooses
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=torch.bfloat16, attn_implementation=attention
    )
    adapters = LoraConfig(r=rank, target_modules=list(LORA_TARGETS))
    model = get_peft_model(model, adapters, autocast_adapter_dtype=adapter_dtype == "float32")
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    embeddings = torch.randn(*shape, config["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(inputs_embeds=embeddings)
    assert output.logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def test_layers_are_sharded_and_all_else_is_whole_on_each_gpu():
    memory = PhaseMemory(weights=900, trained=100, kv_cache=50, activations=200, sharded=800, gathered=80)
    assert memory.total == 1200
    assert memory.num_gpus(1200 / 0.9 + 1) == 1
    # whole are 100 of the weights, what is trained, activations and gathered layers: 480
    assert memory.num_gpus(1199 / 0.9) == 2
    assert memory.num_gpus(680 / 0.9 + 0.01) == 4  # 200 are left for 800
    assert memory.num_gpus(679 / 0.9) == 5
    assert memory.num_gpus(480 / 0.9 - 1) is None
    assert dataclasses.replace(memory, sharded=0).num_gpus(1199 / 0.9) is None
    assert dataclasses.replace(memory, kv_cache=500).total == 1500


def test_layers_of_two_byte_weights_can_be_sharded_and_those_of_4_bits_cannot():
    whole, packed = (estimate_phase(SMALL, WORK, "rl", precision) for precision in ("bf16", "nf4"))
    assert (whole.sharded, packed.sharded) == (2200 * 2, 0)
    assert whole.gathered == 3 * 1200 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1, got -1"),
        ({"adapter_dtype": "int8"}, "adapter_dtype must be one of .* got 'int8'"),
        ({"projector_parameters": -5}, "projector_parameters must not be negative, got -5"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Workload(**change)


def test_unknown_phases_and_precisions_are_refused():
    with pytest.raises(ValueError, match=r"phase must be one of \('align', 'rl'\), got 'joint'"):
        estimate_phase(SMALL, WORK, "joint", "bf16")
    with pytest.raises(ValueError, match=r"precision must be one of \('bf16', 'nf4'\), got 'int8'"):
        estimate_phase(SMALL, WORK, "rl", "int8")


def test_requirements_of_the_8b_model_by_hand(sizes):
    row = language_model_requirements("llama_3_1_8b", Workload(projector_parameters=10**6))
    assert row["letter"] == "C" and row["base_parameters"] == 8_030_261_248
    assert row["lora"]["parameters"] == 83_886_080 and row["lora"]["claimed_parameters"] == 40_000_000
    assert row["lora"]["rank_for_claim"] == pytest.approx(32 * 40 / 83.886080)
    memory = {(part["phase"], part["precision"], part["gradient_checkpointing"]): part for part in row["memory"]}
    assert len(memory) == 8
    rl = memory["rl", "bf16", True]
    assert rl["weights"] == pytest.approx(8_030_261_248 * 2 / GIB)
    assert rl["trained"] == pytest.approx((83_886_080 * 16 + 4 * 10**6) / GIB)
    assert rl["kv_cache"] == pytest.approx(4 * 1024 * 2 * 32 * 8 * 128 * 2 / GIB) == 0.5
    assert rl["total"] == pytest.approx(rl["weights"] + rl["trained"] + rl["activations"]) and rl["num_gpus"] == 1
    nf4 = 6_979_321_856 * NF4_BITS / 8 + 1_050_939_392 * 2  # linear layers; embeddings, head and norms
    assert memory["align", "nf4", True]["weights"] == pytest.approx(nf4 / GIB)
    assert memory["align", "bf16", False]["activations"] > 2 * memory["align", "bf16", True]["activations"]


def test_the_70b_model_needs_several_gpus_whole_and_one_in_4_bits():
    memory = language_model_requirements("llama_3_1_70b", Workload())["memory"]
    gpus = {(part["phase"], part["precision"]): part["num_gpus"] for part in memory if part["gradient_checkpointing"]}
    assert gpus == {("align", "bf16"): 4, ("align", "nf4"): 1, ("rl", "bf16"): 4, ("rl", "nf4"): 1}


def test_the_command_prints_a_table_that_says_what_does_not_follow(capsys):
    assert main(["--configuration", "llama_3_1_8b"]) == 0
    out = capsys.readouterr().out
    assert "8,030,261,248" in out and "83,886,080  rank 32, alpha 128" in out
    assert "the design's 40M does not follow from this rank: it would be rank 15.3" in out
    assert "gemma" not in out and "259,136,768" in out and "4.127 bit" in out
    assert all(len(line) <= 120 for line in out.splitlines())


def test_the_command_prints_all_as_json(capsys):
    arguments = ["--json", "--lora-rank", "8", "--batch-size", "2", "--max-new-tokens", "100", "--gpu-memory-gib", "24"]
    assert main(arguments) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["configuration"] for row in content["configurations"]] == sorted(PUBLISHED)
    assert content["workload"]["batch_size"] == 2 and content["workload"]["gpu_memory_gib"] == 24
    assert {row["lora"]["rank"] for row in content["configurations"]} == {8}
    assert content["configurations"][2]["lora"]["parameters"] == 83_886_080 // 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configuration", "llama_9"], "configuration must be one of ['gemma_2_27b', "),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--configuration", "llama_3_1_8b", "--lora-rank", "-1"], "lora_rank must be at least 1, got -1"),
        (["--gpu-memory-gib", "0"], "gpu_memory_gib must be positive, got 0"),
    ],
)
def test_arguments_that_cannot_be_end_with_2(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
