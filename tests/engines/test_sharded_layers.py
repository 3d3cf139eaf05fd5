"""Two ranks that share a language model's layers compute what each of them would with the whole model."""

from datetime import timedelta

import ignite.distributed as idist
import pytest
import torch
from torch import distributed, nn

from tests.tiny_language_model import make_tiny_language_model
from vlm3d_ext.engines.sharded_layers import shard_decoder_layers
from vlm3d_ext.networks.nets.image_prefix_language_model import ImagePrefixLanguageModel
from vlm3d_ext.text.report_prompt import IMAGE_MARKER

PROMPTS = [f"{IMAGE_MARKER}\nnodule 7 mm, right\nReport:", f"See {IMAGE_MARKER} effusion and more words here\nReport:"]
# model type, gradient checkpointing, shared prompts, whether the image learns (as in alignment) or not (as in rl)
SETTINGS = [
    ("llama", False, True, False),
    ("llama", True, False, True),
    ("gemma2", False, False, True),
    ("gemma2", True, True, False),
]


def _make(folder, checkpointing=False, **settings):
    model = ImagePrefixLanguageModel(
        str(folder), lora_rank=4, gradient_checkpointing=checkpointing, max_prompt_tokens=128, max_report_tokens=24,
        **{"dtype": "float32", **settings},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for weight in model.adapters.values():  # adapters begin with an output of zero, which would hide them
        weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return model.train()


def _figures(model, share, image_learns, seed, num_tokens, max_new_tokens):
    """Return log-probabilities, gradients, and texts of a model: what differs between ranks are the arguments."""
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.randn(2, 5, model.hidden_size, generator=generator).requires_grad_(image_learns)
    token_ids = torch.randint(0, 200, (6, num_tokens), generator=generator)
    mask = torch.arange(num_tokens) < torch.randint(1, num_tokens + 1, (6, 1), generator=generator)
    prompts = model.embed_prompts(prefix, PROMPTS)
    log_probabilities = model.log_probabilities(prompts, token_ids, mask, share_prefix=share)
    log_probabilities.mean().backward()
    gradients = {name: weight.grad for name, weight in model.adapters.items()}
    if image_learns:
        gradients["prefix"] = prefix.grad
    with torch.no_grad():
        prompts = model.embed_prompts(prefix, PROMPTS)
        greedy = model.generate(prompts, max_new_tokens=max_new_tokens, share_prefix=share)
        beams = model.generate(prompts, max_new_tokens=max_new_tokens, share_prefix=share, num_beams=2)
    return log_probabilities.detach(), gradients, greedy.texts, beams.texts


def _rank(local_rank, folder, queue):
    rank = idist.get_rank()
    for model_type, checkpointing, share, image_learns in SETTINGS:
        whole, sharded = (_make(folder / model_type, checkpointing) for _ in range(2))
        shard_decoder_layers(sharded, "cpu")
        sharded.to("cpu")
        # ranks differ in their inputs, in how many tokens there are, and in how many they write
        arguments = (share, image_learns, rank, 1 if rank else 7, 15 if rank else 6)
        for _ in range(2):  # the second time, gradients of the first are there, as in accumulation
            expected, got = (_figures(model, *arguments) for model in (whole, sharded))
            torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
            assert got[1].keys() == expected[1].keys() and got[0].abs().max() > 0
            for name, gradient in expected[1].items():
                torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-5)
                assert type(got[1][name]) is torch.Tensor and gradient.abs().max() > 0
            assert got[2:] == expected[2:]

        layers = sharded.model.model.layers
        weights = {name: weight for name, weight in layers.named_parameters() if "lora_" not in name}
        reference = dict(whole.model.model.layers.named_parameters())
        for name, weight in weights.items():
            half = weight.to_local()
            assert 2 * half.numel() == weight.numel() == reference[name].numel()
            assert torch.equal(half, reference[name].chunk(2)[rank])
        embeddings = sharded.model.get_input_embeddings().weight
        assert type(embeddings) is nn.Parameter and torch.equal(embeddings, whole.model.get_input_embeddings().weight)
        assert sharded.num_base_parameters == whole.num_base_parameters
        assert sharded.base_sha256 == whole.base_sha256
        assert sharded.state_dict().keys() == whole.state_dict().keys()
    queue.put(rank)


def test_two_ranks_compute_what_each_would_alone(tmp_path):
    for model_type in ("llama", "gemma2"):
        make_tiny_language_model(tmp_path / model_type, max_positions=512, model_type=model_type)
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    # ranks that run the model unequally often wait for each other; the timeout makes that an error
    settings = {"init_method": f"file://{tmp_path}/rendezvous", "timeout": timedelta(seconds=60)}
    idist.spawn("gloo", _rank, args=(tmp_path, queue), nproc_per_node=2, **settings)
    assert sorted([queue.get(), queue.get()]) == [0, 1]


@pytest.fixture
def folder(tmp_path):
    return make_tiny_language_model(tmp_path / "model", max_positions=512)


@pytest.fixture
def process_group(tmp_path):
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_one_rank_alone_holds_the_whole(folder, process_group):
    whole, sharded = _make(folder), _make(folder)
    shard_decoder_layers(sharded, "cpu")
    assert sharded.is_sharded and not whole.is_sharded
    expected, got = (_figures(model, True, True, 0, 5, 6) for model in (whole, sharded))
    torch.testing.assert_close(got[0], expected[0])
    assert got[2:] == expected[2:]


def test_what_only_a_backward_pass_would_clear_does_not_grow_while_texts_are_written(folder, process_group):
    model = _make(folder)
    shard_decoder_layers(model, "cpu")
    _figures(model, True, True, 0, 5, 6)
    state = model.model.model._get_fsdp_state()
    assert state._state_ctx.all_states[1:] and not state._comm_ctx.post_forward_order


def test_no_process_group_is_an_error(folder):
    with pytest.raises(RuntimeError, match=r"no process group\. Start the run with torchrun"):
        shard_decoder_layers(_make(folder), "cpu")


def test_4_bits_are_refused(folder, process_group):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"in 4 bits, which cannot be sharded.*ddp.json"):
        shard_decoder_layers(_make(folder, quantization="nf4"), "cpu")


def test_a_model_without_a_list_of_layers_is_refused(folder, process_group):
    model = _make(folder)
    model.model.model.layers = nn.Sequential(*model.model.model.layers)
    with pytest.raises(ValueError, match="LlamaModel has 0 lists of 2 modules, expected one, its decoder layers"):
        shard_decoder_layers(model, "cpu")
