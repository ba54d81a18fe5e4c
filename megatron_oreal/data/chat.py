"""From a question to prompt tokens and from response tokens to text: the tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from megatron_oreal.data.types import Prompt
from megatron_oreal.errors import UserError, nearest

TEMPLATES = Path(__file__).parent / "templates"


class ChatTemplate:
    """A Hugging Face tokenizer with the chat format that prompts are written in.

    ``tokenizer`` is any ``transformers`` tokenizer; ``template`` Jinja source, None: the tokenizer's own;
    ``system_prompt`` the system message before every question, None: none (a template may add its own).
    ``stop_word`` must be one token. ``origin`` names the tokenizer in messages.

    Raises ``UserError`` when there is no template, when it cannot be rendered, or when the stop word is not one token.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_word: str,
        template: str | None = None,
        system_prompt: str | None = None,
        origin: str = "the tokenizer",
    ) -> None:
        if template is None and not tokenizer.chat_template:
            raise UserError(
                f"model.chat_template: {origin} has no chat template of its own: give a Jinja file or one of "
                f"{', '.join(template_names())}"
            )
        self.tokenizer = tokenizer
        self.stop_word = stop_word
        self.stop_token_id = stop_token_id(tokenizer, stop_word, origin)
        self._template = template
        self._system_prompt = system_prompt
        self._probe()

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        *,
        stop_word: str,
        chat_template: str | None = None,
        system_prompt: str | None = None,
    ) -> ChatTemplate:
        """Read the tokenizer of a Hugging Face model directory; the arguments are the keys of ``model`` in the config.

        ``chat_template`` is the path of a Jinja file or the name of a packaged template (``template_names()``).
        """
        return cls(
            load_tokenizer(model_dir),
            stop_word=stop_word,
            template=None if chat_template is None else load_template(chat_template),
            system_prompt=system_prompt,
            origin=f"the tokenizer in {str(model_dir)!r}",
        )

    def render_prompt(self, question: str) -> str:
        """Return the text of system prompt and question up to where the response begins."""
        messages = [{"role": "user", "content": question}]
        if self._system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self._system_prompt})
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )

    def encode_prompt(self, question: str) -> NDArray[np.int32]:
        """Return the prompt's tokens, int32 [P].

        Rendered and tokenised apart: the ids of ``apply_chat_template(tokenize=True)``, which are a list in
        transformers 4 and by default in a ``BatchEncoding`` in 5. The template writes all special tokens itself.
        """
        return self._encode(self.render_prompt(question))

    def encode_example(self, question: str, solution: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return prompt tokens int32 [P] and response tokens int32 [n], the stop token last, for the supervised phase.

        The solution is tokenised by itself, exactly where sampling would begin, and not through the template:
        templates of reasoning models drop the reasoning from finished turns. A stop word it ends with is not doubled.
        """
        body = self._encode(solution.removesuffix(self.stop_word))
        return self.encode_prompt(question), np.append(body, np.int32(self.stop_token_id))

    def decode(self, ids: Sequence[int] | NDArray[np.integer], *, skip_special_tokens: bool = False) -> str:
        """Return the text of response tokens without the stop word that ends them.

        Special tokens within are kept by default, since ``</think>`` and its like tell the verifier where the answer
        begins. Ids beyond the tokenizer's vocabulary (a model's padded rows) decode to nothing.
        """
        tokens = [int(token) for token in ids]
        if tokens and tokens[-1] == self.stop_token_id:
            tokens.pop()
        return self.tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def _encode(self, text: str) -> NDArray[np.int32]:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def _probe(self) -> None:
        """Render once at construction, so that a template's mistakes surface before a model is built."""
        key = "model.chat_template"
        try:
            ids = self.encode_prompt("1 + 1 = ?")
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{key}: Jinja syntax error in line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, TypeError) as error:  # TemplateError is also what raise_exception() raises
            kinds = "user message alone" if self._system_prompt is None else "system and user message"
            reason = " ".join(str(error).split())
            raise UserError(f"{key}: the template refuses a question ({kinds}): {reason}") from None
        if not len(ids):
            raise UserError(f"{key}: the template renders a question to no tokens at all")


def load_tokenizer(model_dir: str | Path) -> Any:
    """Load the tokenizer of a local Hugging Face directory. ``UserError`` when there is none."""
    from transformers import AutoTokenizer

    if not Path(model_dir).is_dir():
        raise UserError(f"model.path={str(model_dir)!r}: no such directory: give a Hugging Face model directory")
    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except Exception as error:  # missing, malformed and unknown tokenizers each raise types of their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.path={str(model_dir)!r}: no tokenizer could be loaded from it ({reason})") from None


def template_names() -> list[str]:
    """Names of the packaged templates."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def load_template(name_or_path: str) -> str:
    """Return the Jinja source of a file, or of a packaged template by its name. ``UserError`` when there is none."""
    for path in (Path(name_or_path), TEMPLATES / f"{name_or_path}.jinja"):
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"model.chat_template={name_or_path!r} is not readable UTF-8 text ({error})") from None
    raise UserError(
        f"model.chat_template={name_or_path!r} is neither a file nor a packaged template"
        f"{nearest(name_or_path, template_names())}"
    )


def stop_token_id(tokenizer: Any, stop_word: str, origin: str = "the tokenizer") -> int:
    """Return the id of the one token that ``stop_word`` is. ``UserError`` naming the tokens it becomes otherwise."""
    ids = tokenizer(stop_word, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id in ids and stop_word != tokenizer.unk_token
    if len(ids) != 1 or unknown:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        raise UserError(
            f"model.stop_word={stop_word!r} must be one token, but {origin} makes {len(ids)} of it: {tokens}: "
            f"its eos_token is {tokenizer.eos_token!r}"
        )
    return ids[0]


def drop_long_prompts(
    prompts: Sequence[Prompt], template: ChatTemplate, max_prompt_tokens: int
) -> tuple[list[Prompt], int]:
    """Return the prompts of at most ``max_prompt_tokens`` tokens, and how many were dropped.

    Raises ``UserError`` when none is left.
    """
    kept = [prompt for prompt in prompts if len(template.encode_prompt(prompt.question)) <= max_prompt_tokens]
    if not kept:
        raise UserError(f"data.max_prompt_tokens={max_prompt_tokens}: all {len(prompts)} prompts are longer: raise it")
    return kept, len(prompts) - len(kept)
