"""Hugging Face's Trainer: one callback. Needs esper-otel[transformers]."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from esper_otel.integrations.transformers import EsperCallback

set_seed(0)
config = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=16,
)
data = [{"input_ids": torch.randint(0, 50, (8,)), "labels": row % 2} for row in range(64)]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=8, num_train_epochs=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(BertForSequenceClassification(config), arguments, train_dataset=data)
    trainer.add_callback(EsperCallback())
    trainer.train()
