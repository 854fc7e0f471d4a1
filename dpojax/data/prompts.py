"""Where a prompt ends, in data that writes it into both completions.

Knows two texts or two conversations, and neither columns nor tokens.
"""

from os.path import commonprefix

from dpojax.data.bad_records import BadRecord
from dpojax.data.fields import Messages, Text, is_blank

# How the transcripts of HH write an assistant's turn.
ASSISTANT_TURN = "\n\nAssistant:"


def split_shared(
    chosen: Text, rejected: Text, origin: str
) -> tuple[Text, tuple[Text, Text]]:
    """The prompt that two completions share, and what is left of each.

    Conversations share their first messages, up to an assistant's turn. Transcripts
    share everything up to their last shared "Assistant:". Other strings share whole
    words; the space before what is left belongs to it.

    Raises:
      ValueError: if one is a string and the other messages, or conversations do not
        begin alike.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        end = _end_of_shared_text(chosen, rejected)
        return chosen[:end], (chosen[end:], rejected[end:])
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRecord(
            f"{origin} mixes strings and chat messages; use one form for all fields."
        )
    end = _end_of_shared_messages(chosen, rejected)
    if end == 0:
        raise BadRecord(
            f"{origin}: chosen and rejected share no message before an assistant's "
            "turn, so there is no prompt; give one in a column of its own."
        )
    return chosen[:end], (chosen[end:], rejected[end:])


def split_after(
    prompt: Text, chosen: Text, rejected: Text, origin: str
) -> tuple[Text, tuple[Text, Text]]:
    """The same where the prompt is given too, if messages begin with it.

    A prompt that is a string is the shared message of a user, and system and earlier
    turns around it are shared as well.
    """
    if isinstance(chosen, str) or isinstance(rejected, str):
        return prompt, (chosen, rejected)
    if isinstance(prompt, str):
        end = _end_of_shared_messages(chosen, rejected)
        asked = [m.get("content") for m in chosen[:end] if m["role"] == "user"]
        if prompt.strip() in [str(text).strip() for text in asked]:
            return split_shared(chosen, rejected, origin)
        return prompt, (chosen, rejected)
    end = len(prompt)
    if end and all(len(s) > end and s[:end] == prompt for s in (chosen, rejected)):
        return prompt, (chosen[end:], rejected[end:])
    return prompt, (chosen, rejected)


def _end_of_shared_text(chosen: str, rejected: str) -> int:
    shared = commonprefix([chosen, rejected])
    turn = shared.rfind(ASSISTANT_TURN)
    if turn >= 0:
        return turn + len(ASSISTANT_TURN)
    end = len(shared)
    while end and not all(_begins_word(text, end) for text in (chosen, rejected)):
        end -= 1
    return end - 1 if end and shared[end - 1] == " " else end


def _begins_word(text: str, place: int) -> bool:
    """Whether a word can begin here, and something is left to say."""
    is_apart = text[place - 1].isspace() or text[place : place + 1].isspace()
    return is_apart and not is_blank(text[place:])


def _end_of_shared_messages(chosen: Messages, rejected: Messages) -> int:
    """How many first messages are the same, with an assistant's turn left to both."""
    most = min(len(chosen), len(rejected)) - 1
    end = 0
    while end < most and chosen[end] == rejected[end]:
        end += 1
    while end > 0 and not all(
        said[end]["role"] == "assistant" for said in (chosen, rejected)
    ):
        end -= 1
    return end
