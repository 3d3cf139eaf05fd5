"""A small classifier of features, its training, and batches of features that depend on their labels."""

from __future__ import annotations

import logging

import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch.utils.data import DataLoader

from vlm3d_ext.engines.keyword_batch import PrepareKeywordBatch
from vlm3d_ext.losses import WeightedBinaryCrossEntropy, WeightedLossSum
from vlm3d_ext.networks.blocks.prompted_text_encoder import PromptedTextEncoder
from vlm3d_ext.networks.heads import MultiLabelClassifier
from vlm3d_ext.networks.nets import FeatureClassifierTraining, ThreeDVisionEncoder, VolumeClassifier
from vlm3d_ext.text.label_set import load_label_set

HIDDEN = 24
NAMES = load_label_set("ct_rate_18").names


def make_classifier(seed=0, **options):
    """Return a classifier with the weights of a seed; its text embeddings are random."""
    torch.manual_seed(seed)
    classifier = MultiLabelClassifier(
        **{
            "hidden_size": HIDDEN,
            "text_hidden_size": 16,
            "projection_dim": 8,
            "num_soft_tokens": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 3,
            **options,
        }
    )
    classifier.text_embeddings.copy_(torch.nn.functional.normalize(torch.randn(classifier.text_embeddings.shape)))
    return classifier.eval()


def make_training(text_folder, seed=0):
    """Return the training of a classifier on features."""
    classifier = make_classifier(seed)
    encoder = ThreeDVisionEncoder(
        patch_size=(4, 8, 8), hidden_size=HIDDEN, num_layers=1, num_heads=3, num_depth_heads=1, mlp_dim=16
    )
    loss = WeightedBinaryCrossEntropy([2.0] * len(NAMES))
    text_encoder = PromptedTextEncoder(str(text_folder))
    return FeatureClassifierTraining(VolumeClassifier(encoder, classifier), text_encoder, loss)


def make_cases(num_cases, seed=0, guided=None):
    """Return loaded cases of features, two of each patient; every seventh label is unknown, the last never positive."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (num_cases, len(NAMES)), generator=generator).float()
    features = torch.randn(num_cases, 21, HIDDEN, generator=generator) * 2 + 1
    features[:, :, : len(NAMES)] += labels[:, None]
    labels[:, -1] = 0
    labels.view(-1)[::7] = float("nan")
    return [
        {
            "volume_id": f"train_{number // 2}_a_{number % 2}",
            "patient_id": f"train_{number // 2}",
            "features": features[number],
            "labels": labels[number],
            "use_anatomical_mask": torch.tensor(number % 2 == 1 if guided is None else guided),
        }
        for number in range(num_cases)
    ]


def make_trainer(training, cases, *handlers, epochs=1, batch_size=5):
    """Return a trainer of the classifier."""
    return SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=DataLoader(cases, batch_size),
        network=training,
        optimizer=torch.optim.SGD([p for p in training.parameters() if p.requires_grad], lr=0.1),
        loss_function=WeightedLossSum({"classification": 1.0}),
        prepare_batch=PrepareKeywordBatch(["labels"], image_key="features"),
        train_handlers=list(handlers),
        decollate=False,
    )


def make_evaluator(network, cases, *handlers, keys=(), batch_size=4, **options):
    """Return an evaluator of a classifier, or of its training with the key "labels"."""
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(cases, batch_size),
        network=network,
        prepare_batch=PrepareKeywordBatch(list(keys), image_key="features"),
        val_handlers=list(handlers),
        decollate=False,
        **options,
    )
    evaluator.logger.setLevel(logging.INFO)
    return evaluator
