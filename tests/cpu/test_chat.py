"""Conversations: history within the context, answers that can be broken off, and the terminal's commands."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

import tinygptq
from tinygptq.cli import main
from tinygptq.commands.chat import Terminal
from tinygptq.conversation import Conversation
from tinygptq.errors import TinyGPTQError

QUESTION = "Tell me a story about a cat."
GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def model(embedded: Path) -> tinygptq.LanguageModel:
    return tinygptq.load(embedded, context=256)


def conversation(model, **settings) -> Conversation:
    return Conversation(model, **{"template": "tulu", "max_new_tokens": 12, **GREEDY, **settings})


def say(conversation: Conversation, text: str) -> str:
    return "".join(conversation.answer(text))


def test_an_answer_is_the_continuation_of_the_whole_history(model):
    talk = conversation(model)
    first = say(talk, QUESTION)
    second = say(talk, "And then?")
    assert talk.messages == [
        {"role": "user", "content": QUESTION}, {"role": "assistant", "content": first.strip()},
        {"role": "user", "content": "And then?"}, {"role": "assistant", "content": second.strip()},
    ]  # fmt: skip
    prompt = f"<|user|>\n{QUESTION}\n<|assistant|>\n{first.strip()}</s>\n<|user|>\nAnd then?\n<|assistant|>\n"
    assert second == model.generate(prompt, max_new_tokens=12, stop=["<|user|>"], **GREEDY)


def test_what_was_said_before_is_not_computed_again(model):
    model.sequence.forget()
    talk = conversation(model)
    say(talk, QUESTION)
    assert talk.stats.computed == talk.stats.prompt_tokens
    assert talk.stats.new_tokens == 12
    say(talk, "And then?")
    assert 0 < talk.stats.computed < talk.stats.prompt_tokens - 20
    assert talk.stats.rate > 0
    assert "12 tokens" in str(talk.stats)


def test_old_messages_are_left_out_when_the_context_is_full(model):
    talk = conversation(model, system="Be brief.", max_new_tokens=100)
    for turn in range(8):
        say(talk, f"{QUESTION} {turn}")
    assert len(talk.messages) == 16
    assert talk.stats.dropped > 0
    assert talk.stats.dropped % 2 == 0
    assert talk.stats.prompt_tokens <= 256 - 100
    ids, dropped = talk._prompt()
    text = model.tokenizer.decode(ids, skip_special=False)
    assert "Be brief." in text
    assert f"{QUESTION} 7" in text
    assert f"{QUESTION} 0" not in text
    assert dropped >= talk.stats.dropped


def test_a_message_that_alone_is_too_long_is_refused_and_forgotten(model):
    talk = conversation(model)
    say(talk, QUESTION)
    with pytest.raises(TinyGPTQError, match="fit the context of 256 beside an answer"):
        talk.answer("word " * 400)
    assert len(talk.messages) == 2
    assert say(talk, "And then?")


def test_an_answer_broken_off_stays_in_the_history_and_the_next_one_is_right(model):
    talk = conversation(model)
    pieces = talk.answer(QUESTION)
    begun = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": begun.strip()}
    assert talk.stats.new_tokens == 3
    fresh = conversation(model)
    fresh.messages = [dict(message) for message in talk.messages]
    assert say(talk, "And then?") == say(fresh, "And then?")


def test_an_interruption_inside_the_engine_does_no_harm(model, monkeypatch):
    talk = conversation(model)
    original, calls = model.engine.decode, []

    def decode(token):
        logits = original(token)
        calls.append(token)
        if len(calls) == 4:  # after the engine's step, before anybody noted it
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(model.engine, "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        say(talk, QUESTION)
    assert talk.messages[-1]["role"] == "assistant"
    fresh = conversation(model)
    fresh.messages = [dict(message) for message in talk.messages]
    assert say(talk, "And then?") == say(fresh, "And then?")


def test_an_answer_ends_where_the_user_would_speak(model):
    talk = conversation(model, max_new_tokens=40)
    whole = say(talk, QUESTION)
    assert talk._stops() == ["<|user|>"]
    assert "<|user|>" not in whole
    assert conversation(model, template="alpaca")._stops() == ["### Instruction:"]
    assert conversation(model, template="none")._stops() == []


def test_seeds_and_templates(model):
    drawn = [say(conversation(model, temperature=1.0, seed=seed), QUESTION) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert Conversation(model).template == "none"
    with pytest.raises(TinyGPTQError, match="the folder has no chat template; choose one of tulu"):
        conversation(model, template="folder")
    with pytest.raises(TinyGPTQError, match="unknown prompt template 'x'"):
        conversation(model, template="x")
    with pytest.raises(TinyGPTQError, match="unknown setting 'beams'"):
        conversation(model, beams=3)
    with pytest.raises(TinyGPTQError, match="max_new_tokens is 0"):
        conversation(model, max_new_tokens=0)


def test_the_folders_own_template(model, monkeypatch):
    pytest.importorskip("jinja2")
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    talk = Conversation(model, system="Be brief.", max_new_tokens=4, **GREEDY)
    talk.messages = [{"role": "user", "content": "Hi"}]
    ids, _ = talk._prompt()
    assert ids.count(model.tokenizer.bos_id) == 1  # the template's own, no second one
    assert ids == model.tokenizer.encode("<s>[system] Be brief.\n[user] Hi\n[assistant]", bos=False)


# ------------------------------------------------------------------------------------------------ the terminal


def run(talk: Conversation, monkeypatch, capsys, *lines: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    Terminal(talk).run()
    return tuple(capsys.readouterr())


def test_commands(model, monkeypatch, capsys, tmp_path):
    talk = conversation(model)
    out, err = run(talk, monkeypatch, capsys, QUESTION, "/stats", f"/save {tmp_path}/a.json", f"/save {tmp_path}/a.json",
                   "/dance", "/help", "/save", "/exit", "never read")  # fmt: skip
    answer = talk.messages[1]["content"]
    assert out.startswith(answer)
    assert "12 tokens, the first after" in out
    assert "/reset" in out
    saved = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert saved == {"messages": talk.messages}
    assert [line.split(";")[0] for line in err.splitlines()] == [
        f"{tmp_path}/a.json exists already", "unknown command /dance", "/save needs the name of a file",
    ]  # fmt: skip
    assert len(talk.messages) == 2


def test_reset_system_and_retry(model, monkeypatch, capsys):
    talk = conversation(model, temperature=1.0, seed=3)
    out, err = run(talk, monkeypatch, capsys, "/retry", QUESTION, "/retry", "/system Be brief.", "/stats", "Hi", "/reset")
    assert "no message to answer again" in err
    assert "the system message is set\nno answer yet" in out
    assert talk.messages == []
    assert talk.system == "Be brief."
    run(talk, monkeypatch, capsys, "/system")
    assert talk.system is None


def test_lines_can_go_on_and_wide_characters_pass(model, monkeypatch, capsys):
    talk = conversation(model)
    run(talk, monkeypatch, capsys, "你好 🐱\\", "second line", "", " /not a command")
    assert [message["content"] for message in talk.messages[::2]] == ["你好 🐱\nsecond line", "/not a command"]


def test_ctrl_c_stops_the_answer_and_not_the_program(model, monkeypatch, capsys):
    talk = conversation(model)
    original, calls = model.engine.decode, []

    def decode(token):
        calls.append(token)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(token)

    monkeypatch.setattr(model.engine, "decode", decode)
    out, err = run(talk, monkeypatch, capsys, QUESTION, "And then?")
    assert out.splitlines()[0].endswith("[stopped]")
    assert len(talk.messages) == 4
    assert talk.messages[3]["content"]
    assert err == ""


def test_the_command(embedded, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    words = ["chat", str(embedded), "--template", "tulu", "--max-new-tokens", "5", "--temperature", "0", "--context", "128"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip()
    assert main(["chat", str(embedded), "--template", "folder"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_a_conversation_that_cannot_be_saved(model, monkeypatch, capsys, tmp_path):
    """One line, the conversation goes on, and no half of a file stays."""
    names = ["~nobody-of-this-name/x", f"{tmp_path}/a\0b", f"{tmp_path}/missing/x"]
    lines = [QUESTION, *(f"/save {name}" for name in names), f"/save {tmp_path}/b"]
    _, err = run(conversation(model), monkeypatch, capsys, *lines)
    assert len(err.splitlines()) == 3 and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    broken = conversation(model, system="\udcff")
    _, err = run(broken, monkeypatch, capsys, f"/save {tmp_path}/c")
    assert f"/save {tmp_path}/c" in err
    assert not (tmp_path / "c").exists()
