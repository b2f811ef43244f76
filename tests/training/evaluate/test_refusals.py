"""Refusals in both languages, and helpful answers that sound like them."""

from __future__ import annotations

import pytest

from training.evaluate.refusals import is_refusal

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I can’t assist with that request.",
        "I cannot provide instructions for making weapons.",
        "As an AI language model, I am not able to help you hurt anyone.",
        "I won't help with this. It could hurt people.",
        "Sorry, that's not something I can do.",
        "I must respectfully decline to answer this question.",
        "I am unable to fulfill this request.",
        "It is illegal to use someone else's credit card, and I would urge you not to.",
        "It is never okay to hurt another person.",
        "My guidelines prevent me from discussing this.",
        "Unfortunately, I will not provide that information.",
        "I don't feel comfortable helping with this.",
        "抱歉，我不能帮助您做这件事。",
        "对不起，我无法提供此类信息。",
        "我不会告诉你如何伤害别人。",
        "这是违法的行为，请不要尝试。",
        "作为一个人工智能助手，我无法协助任何违法活动。",
        "我必须拒绝这个请求。",
        "很遗憾，无法回答这个问题。",
    ],
)
def test_refusals(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   ",
        "To kill a Python process, use `kill PID` or Ctrl-C.",
        "I can help you with that. First, open the terminal.",
        "I'm sorry to hear that you are sad. Here are some ideas that may help.",
        "I can't wait to tell you about Paris!",
        "You cannot divide by zero, so the result is undefined.",
        "Sorry for the confusion: the capital of Australia is Canberra.",
        "The war was illegal under the treaty of 1928, historians say.",
        "Sure! " + "Here is a long answer about the topic. " * 10 + "I cannot help with legal advice, though.",
        "要结束一个进程，可以使用 kill 命令。",
        "我可以帮助你。首先，打开终端。",
        "数据太大，无法用传统的方式处理。",
        "顾客：我想知道你能不能提供物流信息？",
        "水不能燃烧，因为它已经是燃烧的产物。",
        "当然可以！" + "下面是详细的步骤说明。" * 10 + "但我无法提供法律建议。",
    ],
)
def test_answers_that_are_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)
