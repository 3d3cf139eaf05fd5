import copy

import pytest
import torch
from torch import nn

from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.networks.blocks.prompted_text_encoder import PromptedTextEncoder, state_dict_sha256
from vlm3d_ext.text.finding_prompts import tokenize_findings
from vlm3d_ext.text.label_set import Finding, load_label_set
from vlm3d_ext.text.pretrained_text_model import load_text_model

TYPES = ("bert", "distilbert", "roberta")
HIDDEN = 16
FINDINGS = load_label_set("ct_rate_18").findings


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return {kind: str(make_tiny_text_model(root / kind, model_type=kind)) for kind in TYPES}


@pytest.fixture(params=TYPES)
def folder(request, folders):
    return folders[request.param]


def tokens(encoder, findings=FINDINGS[:3]):
    prompts = tokenize_findings(encoder.tokenizer, findings, encoder.max_positions)
    return prompts.input_ids, prompts.attention_mask


def soft(num_prompts, num_tokens=3, seed=0):
    return torch.randn(num_prompts, num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def plain_states(folder, input_ids, attention_mask):
    """Return what the model of transformers itself makes of tokens."""
    with torch.no_grad():
        return load_text_model(folder)[1](input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


@pytest.mark.parametrize("soft_prompts", [None, "empty"])
def test_without_soft_prompts_it_is_the_plain_model(folder, soft_prompts):
    encoder, first = PromptedTextEncoder(folder), PromptedTextEncoder(folder, pooling="cls")
    ids, mask = tokens(encoder)
    empty = None if soft_prompts is None else torch.zeros(len(ids), 0, HIDDEN)
    states = plain_states(folder, ids, mask)
    torch.testing.assert_close(first(ids, mask, empty), states[:, 0], atol=1e-6, rtol=0)
    by_hand = torch.stack([row[kept.bool()].mean(0) for row, kept in zip(states, mask, strict=True)])
    torch.testing.assert_close(encoder(ids, mask, empty), by_hand, atol=1e-6, rtol=0)


def test_soft_prompts_that_are_words_give_the_sentence_with_those_words(folder):
    """[CLS] soft soft b c, with the embeddings of "no pleural" as soft prompts, is [CLS] no pleural b c."""
    encoder = PromptedTextEncoder(folder)
    whole = encoder.tokenizer("no pleural effusion is seen", return_tensors="pt")["input_ids"]
    rest = torch.cat([whole[:, :1], whole[:, 3:]], dim=1)
    words = load_text_model(folder)[1].get_input_embeddings()(whole[:, 1:3]).detach()
    expected = encoder(whole, torch.ones_like(whole))
    torch.testing.assert_close(encoder(rest, torch.ones_like(rest), words), expected, atol=1e-6, rtol=0)
    swapped = encoder(rest, torch.ones_like(rest), words.flip(1))
    assert (swapped - expected).abs().max() > 1e-3  # else the test above could not fail


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_matter(folder, pooling):
    encoder = PromptedTextEncoder(folder, pooling)
    ids, mask = tokens(encoder)
    further = torch.full((len(ids), 7), 9)
    padded_ids, padded_mask = torch.cat([ids, further], 1), torch.cat([mask, torch.zeros_like(further)], 1)
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-12)):  # values are about 1, so some ulps
        encoder.to(dtype)
        for prompts in (None, soft(len(ids)).to(dtype)):
            expected = encoder(ids, mask, prompts)
            for longer_mask in (padded_mask, padded_mask.bool()):
                longer = encoder(padded_ids, longer_mask, prompts)
                torch.testing.assert_close(longer, expected, atol=tolerance, rtol=0)


def test_prompts_do_not_see_each_other_and_all_soft_prompts_matter(folder):
    encoder = PromptedTextEncoder(folder)
    ids, mask = tokens(encoder)
    prompts = soft(len(ids)).requires_grad_()
    encoder(ids, mask, prompts)[1].square().sum().backward()
    per_token = prompts.grad.abs().amax(-1)
    assert (per_token[1] > 0).all() and not per_token[0].any() and not per_token[2:].any()


def test_the_gradient_is_the_slope(folders):
    encoder = PromptedTextEncoder(folders["bert"]).double()
    ids, mask = tokens(encoder, FINDINGS[:1])
    prompts = soft(len(ids), 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda given: encoder(ids, mask, given), prompts)


class Parent(nn.Module):
    def __init__(self, folder):
        super().__init__()
        self.text_encoder = PromptedTextEncoder(folder, chunk_size=2)
        self.soft_prompts = nn.Parameter(soft(3, 2))
        self.projector = nn.Linear(HIDDEN, 4)

    def forward(self):
        return self.projector(self.text_encoder.embed_findings(FINDINGS[:3], self.soft_prompts).positive)


def test_training_moves_the_soft_prompts_and_never_the_weights(folder):
    parent = Parent(folder).train()
    before, start = parent.text_encoder.weights_sha256, parent.soft_prompts.detach().clone()
    parent.requires_grad_(True)  # an over-eager caller
    optimizer = torch.optim.SGD([p for p in parent.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = parent().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and (parent.soft_prompts != start).any(-1).all()
    assert parent.text_encoder.weights_sha256 == before
    assert sum(p.numel() for p in parent.parameters()) == 3 * 2 * HIDDEN + HIDDEN * 4 + 4
    assert parent.text_encoder.num_parameters == sum(p.numel() for p in load_text_model(folder)[1].parameters())


def test_it_stays_in_evaluation_mode(folder):
    parent = Parent(folder).train()
    assert parent.training and not parent.text_encoder.training
    assert torch.equal(parent(), parent())  # the tiny models have dropout 0.1
    parent.eval()
    evaluated = parent()
    assert torch.equal(parent.train()(), evaluated)


def test_its_weights_do_not_travel_in_checkpoints(folder, folders, tmp_path):
    parent = Parent(folder)
    assert set(parent.state_dict()) == {"soft_prompts", "projector.weight", "projector.bias"}
    torch.save(parent.state_dict(), tmp_path / "checkpoint.pt")
    other = Parent(folder)
    with torch.no_grad():
        other.soft_prompts.zero_()
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True)
    assert torch.equal(other(), parent())


def test_it_follows_its_parent_in_type_and_device(folder):
    parent = Parent(folder)
    expected = parent()
    assert parent.double()().dtype == torch.float64
    torch.testing.assert_close(parent().float(), expected, atol=1e-5, rtol=1e-4)
    assert parent.to("meta").text_encoder.device == torch.device("meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu(folder):
    parent = Parent(folder)
    expected, digest = parent(), parent.text_encoder.weights_sha256
    parent.cuda()
    assert parent.text_encoder.device.type == "cuda"
    assert parent.text_encoder.weights_sha256 == digest
    torch.testing.assert_close(parent().cpu(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(parent(), parent())


def test_a_copy_is_independent(folder):
    parent = Parent(folder)
    clone = copy.deepcopy(parent)
    assert torch.equal(clone(), parent()) and clone.double() is clone
    assert parent().dtype == torch.float32


def test_two_calls_are_bit_equal_and_chunks_change_nothing(folder):
    encoder = PromptedTextEncoder(folder, chunk_size=100)
    whole, again = (encoder.embed_findings(FINDINGS, soft(18)) for _ in range(2))
    assert torch.equal(whole.positive, again.positive) and torch.equal(whole.negative, again.negative)
    encoder.chunk_size = 5
    in_chunks = encoder.embed_findings(FINDINGS, soft(18))
    torch.testing.assert_close(in_chunks.positive, whole.positive, atol=1e-6, rtol=0)
    torch.testing.assert_close(in_chunks.negative, whole.negative, atol=1e-6, rtol=0)


def test_gradients_do_not_depend_on_chunks(folder):
    gradients = []
    for chunk_size in (100, 4):
        prompts = soft(18).requires_grad_()
        encoder = PromptedTextEncoder(folder, chunk_size=chunk_size)
        embeddings = encoder.embed_findings(FINDINGS, prompts)
        (embeddings.positive - embeddings.negative).square().sum().backward()
        gradients.append(prompts.grad)
    assert gradients[0].abs().amax(-1).all()
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


def test_chunks_hold_less_for_the_backward_pass(folders):
    """What is kept between the passes is one chunk's input, not every layer's activations."""

    def kept_bytes(chunk_size):
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        encoder = PromptedTextEncoder(folders["bert"], chunk_size=chunk_size)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            encoder.embed_findings(FINDINGS, soft(18).requires_grad_())
        return sum(storages.values())

    assert kept_bytes(4) < 0.2 * kept_bytes(100)


def test_embeddings_of_findings_are_means_of_their_prompts(folder):
    first = Finding(
        "A", "a", (), ("A mass.", "A mass is seen in the lung.", "Mass."), ("No mass.", "Lungs are clear."), ()
    )
    second = Finding("B", "b", (), ("The heart is large.",), (), ())
    encoder, prompts = PromptedTextEncoder(folder), soft(2)

    def mean_of(texts, soft_prompt):
        rows = []
        for text in texts:
            ids = encoder.tokenizer(text, return_tensors="pt")["input_ids"]
            rows.append(encoder(ids, torch.ones_like(ids), soft_prompt[None]))
        return torch.cat(rows).mean(0)

    found = encoder.embed_findings([first, second], prompts)
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(found.positive[0], mean_of(first.positive_prompts, prompts[0]), **close)
    torch.testing.assert_close(found.negative[0], mean_of(first.negative_prompts, prompts[0]), **close)
    torch.testing.assert_close(found.positive[1], mean_of(second.positive_prompts, prompts[1]), **close)
    assert found.has_negative.tolist() == [True, False] and not found.negative[1].any()
    positive_only = encoder.embed_findings([first, second], prompts, use_negative=False)
    torch.testing.assert_close(positive_only.positive, found.positive, **close)
    assert not positive_only.has_negative.any() and not positive_only.negative.any()


def test_positions_are_counted_exactly(folders):
    """BERT takes all 48 of the table of positions; RoBERTa's first stands behind the padding's, which is 0 here."""
    for kind, expected in (("bert", 48), ("distilbert", 48), ("roberta", 47)):
        encoder = PromptedTextEncoder(folders[kind])
        assert encoder.max_positions == expected and encoder.hidden_size == HIDDEN
        ids = torch.full((1, expected - 3), 7)
        assert encoder(ids, torch.ones_like(ids), soft(1)).isfinite().all()
        with pytest.raises(ValueError, match=f"exceed the {expected} positions"):
            encoder(ids, torch.ones_like(ids), soft(1, 4))
        with pytest.raises(ValueError, match=f"at most {expected - 40} fit"):
            long = Finding("X", "x", (), ("a mass " * 10,), (), ())
            encoder.embed_findings([long], soft(1, 40))


def test_digest_of_weights_sees_every_change_and_no_order():
    state = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3), "empty": torch.zeros(0)}
    digest = state_dict_sha256(state)
    assert len(digest) == 64 and state_dict_sha256(dict(reversed(state.items()))) == digest
    assert state_dict_sha256({**state, "b": state["b"].T.contiguous().T}) == digest  # layout in memory
    changed = state["b"].clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    variants = [
        {**state, "b": changed},
        {**state, "b": state["b"].reshape(3, 2)},
        {**state, "b": state["b"].view(torch.int32)},
        {("c" if name == "b" else name): tensor for name, tensor in state.items()},
        {name: tensor for name, tensor in state.items() if name != "empty"},
    ]
    assert len({digest, *map(state_dict_sha256, variants)}) == 1 + len(variants)


def test_digest_of_an_encoder_changes_with_one_weight(folders):
    encoder, same = PromptedTextEncoder(folders["bert"]), PromptedTextEncoder(folders["bert"])
    assert encoder.weights_sha256 == same.weights_sha256
    assert encoder.embeddings_sha256 == same.embeddings_sha256
    first = PromptedTextEncoder(folders["bert"], pooling="cls")
    assert first.weights_sha256 == encoder.weights_sha256 and first.embeddings_sha256 != encoder.embeddings_sha256
    with torch.no_grad():
        same._held[0].get_input_embeddings().weight[5, 3] += 1e-3
    assert encoder.weights_sha256 != same.weights_sha256
    assert encoder.embeddings_sha256 != same.embeddings_sha256


@pytest.mark.parametrize(
    ("ids", "mask", "soft_prompts", "message"),
    [
        ((2, 5), (2, 4), None, r"must both be \(P, T\)"),
        ((5,), (5,), None, r"must both be \(P, T\)"),
        ((2, 5), (2, 5), (3, 1, HIDDEN), r"must be \(2, S, 16\), got \(3, 1, 16\)"),
        ((2, 5), (2, 5), (2, 1, 8), r"must be \(2, S, 16\)"),
        ((2, 5), (2, 5), (2, HIDDEN), r"must be \(2, S, 16\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(folders, ids, mask, soft_prompts, message):
    encoder = PromptedTextEncoder(folders["bert"])
    given = None if soft_prompts is None else torch.zeros(soft_prompts)
    with pytest.raises(ValueError, match=message):
        encoder(torch.ones(ids, dtype=torch.int64), torch.ones(mask), given)


def test_bad_settings_and_models_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"pooling must be one of .* got 'max'"):
        PromptedTextEncoder(folders["bert"], pooling="max")
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        PromptedTextEncoder(folders["bert"], chunk_size=0)
    with pytest.raises(ValueError, match="3 findings but 2 soft prompts"):
        PromptedTextEncoder(folders["bert"]).embed_findings(FINDINGS[:3], soft(2))
    with pytest.raises(FileNotFoundError, match="make_text_encoder"):
        PromptedTextEncoder(str(tmp_path / "missing"))


def test_a_decoder_is_refused(folders, tmp_path):
    from transformers import GPT2Config, GPT2Model

    tokenizer = load_text_model(folders["bert"])[0]
    tokenizer.cls_token = None
    tokenizer.save_pretrained(tmp_path)
    GPT2Model(GPT2Config(vocab_size=300, n_positions=48, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"GPT2Model.*does not put a \[CLS\] token first"):
        PromptedTextEncoder(str(tmp_path))
