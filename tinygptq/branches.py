"""The six permutations that a published GPTQ repository offers, one branch each, under the names the model card gives."""

from __future__ import annotations

from tinygptq.config import QuantizeConfig

BRANCHES = {
    "main": QuantizeConfig(bits=4, group_size=128),
    "gptq-4bit-32g-actorder_True": QuantizeConfig(bits=4, group_size=32, desc_act=True),
    "gptq-4bit-64g-actorder_True": QuantizeConfig(bits=4, group_size=64, desc_act=True),
    "gptq-4bit-128g-actorder_True": QuantizeConfig(bits=4, group_size=128, desc_act=True),
    "gptq-8bit--1g-actorder_True": QuantizeConfig(bits=8, group_size=-1, desc_act=True),
    "gptq-8bit-128g-actorder_False": QuantizeConfig(bits=8, group_size=128),
}
