"""Fixtures that several files use."""

import logging

import pytest
import torch
from peft import LoraConfig

from atp_rl.model.tiny import BuildPlan, make_model, make_tokenizer

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel that only 4-bit weights need


@pytest.fixture(scope="session")
def random_base(tmp_path_factory):
    """Folder of a model of random weights that reads its whole context and draws the end token about once in eight."""
    plan = BuildPlan(vocabulary=512, hidden=32, layers=2)
    tokenizer = make_tokenizer(plan)
    model = make_model(plan, tokenizer)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight *= 4  # fresh weights hardly look at the context
            # a bias towards the end token: the first entry of the hidden states is positive, and large for that token
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[0] = 0
            elif name == "model.norm.weight":
                weight[0] = 5
            elif name == "model.embed_tokens.weight":
                weight[:, 0] = 1
                weight[tokenizer.convert_tokens_to_ids("<|im_end|>"), 0] = 4
    folder = tmp_path_factory.mktemp("random_base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def lora():
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
