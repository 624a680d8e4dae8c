"""Models that are small enough to be made for a test."""

import pytest
import torch
from peft import LoraConfig

from atp_rl.model.tiny import BuildPlan, make_model, make_tokenizer


@pytest.fixture(scope="session")
def random_base(tmp_path_factory):
    """Folder of a model of random weights that reads its whole context and ends about one reply in ten at every token."""
    plan = BuildPlan(vocabulary=512, hidden=32, layers=2)
    tokenizer = make_tokenizer(plan)
    model = make_model(plan, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 4  # fresh weights hardly look at the context
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 0.25  # so that this entry of every hidden state is positive ...
        embedding[tokenizer.eos_token_id, 0] = 4.0  # ... and acts as a bias towards the end token
    folder = tmp_path_factory.mktemp("random_base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def lora():
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
