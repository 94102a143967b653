"""Chapter 13: a prompt in ChatML, as a server would have to write it.

Each turn is `<|im_start|>`, the role, a line break, the text, `<|im_end|>`, a line break. A chat that does not begin
with a system message gets SYSTEM in front. The prompt for an answer ends with the header of the assistant's turn, up to
the line break after its role.
"""

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def prompt(messages: list[dict[str, str]]) -> str:
    raise NotImplementedError


def test_prompt() -> None:
    from tour.recompute import MODEL, load_tokenizer

    tok = load_tokenizer(MODEL)
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ahoy?"}
    answer, second = {"role": "assistant", "content": "Ahoy!"}, {"role": "user", "content": " Where to?\n"}
    for messages in ([first], [first, answer, second], [system, first], [system, first, answer, second]):
        assert prompt(messages) == tok.render_chat(messages, add_generation_prompt=True)
