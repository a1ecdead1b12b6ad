"""The tokenizer of the sprites checkpoints: one token per word of the caption grammar, in the Hub's file layout."""

from pathlib import Path

from kinema.data.captions import vocabulary as words_of_captions

SPECIAL = ("<pad>", "</s>", "<unk>")


def vocabulary() -> dict[str, int]:
    """Word → token id; the special tokens come first, as in T5."""
    return {word: number for number, word in enumerate((*SPECIAL, *sorted(words_of_captions())))}


def tokenizer():
    """A fast `tokenizers.Tokenizer`. Words that are not in the grammar become `<unk>`; every text ends with `</s>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # type: ignore[assignment]
    return words


def write_tokenizer(folder: Path) -> None:
    """Writes `folder`, which transformers' `AutoTokenizer` reads."""
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), padding_side="right", model_max_length=512, **special)
    fast.save_pretrained(folder)
