"""Which groups use symmetric memory: the rule, and the reason of every no."""

import pytest

from fixpass.runtime.symmetric_memory.engines import role_in_engine
from fixpass.runtime.symmetric_memory.policy import GroupFacts, Policy, decide

DP = Policy(dp_attention=True)
PADDED = Policy(dp_attention=True, dp_max_padding=True)


@pytest.mark.parametrize(
    ("facts", "policy", "symmetric", "reason"),
    [
        (GroupFacts("0", 2), Policy(), True, "a TP group with as many tokens on each rank"),
        (GroupFacts("0", 2, "attn_tp"), Policy(), True, "an attention-TP group"),
        (GroupFacts("0", 2, "attn_tp"), DP, True, "an attention-TP group"),
        (GroupFacts("0", 2), DP, False, "hold different numbers of tokens"),
        (GroupFacts("0", 2), PADDED, True, "a TP group"),
        (GroupFacts("0", 1), Policy(), False, "group '0' has one rank"),
        (GroupFacts("0", 16, num_hosts=2), Policy(), False, "are on 2 hosts, not on one"),
        (GroupFacts("0", 2), Policy(enabled=False), False, "symmetric memory is off"),
        (
            GroupFacts("0", 2, obstacle="no room"),
            Policy(),
            False,
            "has no symmetric memory: no room",
        ),
    ],
)
def test_the_rule_and_its_reasons(facts, policy, symmetric, reason):
    decision = decide(facts, policy)
    assert bool(decision) is symmetric
    assert reason in decision.reason


@pytest.mark.parametrize(
    ("name", "role"), [("tp:0", "tp"), ("attn_tp:0", "attn_tp"), ("attention_tp:0", "attn_tp")]
)
def test_an_engines_group_says_what_it_is_for_by_its_name(name, role):
    assert role_in_engine(name) == role
