"""Turns cached pictures and their texts into questions and answers."""

import json
import random
import re
from pathlib import Path

import torch

KINDS = {
    "photo": "photograph",
    "painting": "picture of an artwork or a document",
    "map": "map",
    "chart": "chart",
    "diagram": "diagram",
}
DETAILED = (
    "Describe the picture in detail.",
    "What does the picture show? Describe it in detail.",
    "Please give a detailed description of this picture.",
    "Explain what can be seen in this picture, and what it is about.",
    "Look at the picture and describe everything in it.",
    "Tell me about this picture in detail.",
    "What is happening in this picture? Answer in detail.",
    "Describe this image.",
)
BRIEF = (
    "Describe the picture briefly.",
    "What is in the picture?",
    "What does this picture show? Answer in short.",
)
LONG = (
    " Write at least 1000 words.",
    " Your answer should have at least 1000 words.",
    " Please answer with at least 1000 words.",
)
SPELLING = {
    "Faces": "person's face",
    "Faces_easy": "person's face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "car seen from the side",
    "cougar_body": "cougar",
    "crocodile_head": "head of a crocodile",
    "cougar_face": "face of a cougar",
    "flamingo_head": "head of a flamingo",
    "yin_yang": "yin and yang sign",
    "binocular": "pair of binoculars",
    "scissors": "pair of scissors",
    "windsor_chair": "Windsor chair",
    "garfield": "cartoon cat",
    "snoopy": "cartoon dog",
}
MAX_ANSWER = 192  # tokens; longer answers are cut after a sentence
PLAIN = str.maketrans({"“": '"', "”": '"', "’": "'", "‘": "'", "\xa0": " ", "\n": " "})
CREDIT = re.compile(
    r"\s*\(\s*(figure\s+)?(photo\s+|image\s+)?(credit|attribution|source|cc)[^()]*"
    r"(\([^()]*\)[^()]*)*\)\.?",
    re.IGNORECASE,
)


def tidy(text: str) -> str:
    """Drop credit lines and typographic signs, and end with a full stop."""
    text = CREDIT.sub("", text.translate(PLAIN))
    text = re.sub(r"\s+", " ", text).strip()
    return text + "." if text and text[-1] not in ".?!\"'" else text


def openstax_answers(row: dict) -> tuple[str, str, str]:
    """Write the detailed answer, its last sentence and the brief answer about a picture."""
    alt, caption = tidy(row["text"]), tidy(row["caption"])
    article = f"This picture is a {KINDS[row['kind']]}."
    topic = re.sub(r"[^\x20-\x7e]", "", row["topic"].translate(PLAIN)).strip(" .:")
    parts = [article, alt]
    if caption and caption[:60] != alt[:60]:
        parts.append(caption)
    last = f" The picture belongs to a text about {topic}."
    if not topic or topic in ("Introduction", "Preface"):
        last = ""
    return " ".join(parts), last, alt


def class_answers(label: str) -> tuple[str, str, str]:
    """Write the detailed answer, its last sentence and the brief answer about a class."""
    thing = SPELLING.get(label, label.replace("_", " ").lower())
    article = "an" if thing[0] in "aeiou" else "a"
    brief = f"A photo of {article} {thing}."
    detailed = f"This picture is a photograph. {brief} The {thing} is the main subject."
    return detailed, f" The picture belongs to a text about {thing}.", brief


def cut(tokens: list[int], full_stops: set[int], limit: int) -> list[int]:
    """Cut a long answer after its last whole sentence within `limit` tokens."""
    if len(tokens) <= limit:
        return tokens
    ends = [index for index in range(limit) if tokens[index] in full_stops]
    return tokens[: ends[-1] + 1] if ends else tokens[:limit]


class Conversations:
    """All questions and answers, tokenised.

    `cache` is the folder that `cache_features.py` wrote. Every item is a dict of `picture`
    (index into the features, or None), `prompt` and `answer` (token ids).
    """

    def __init__(self, cache: Path, tokenizer) -> None:
        with open(cache / "pictures.jsonl", encoding="utf-8") as file:
            self.pictures = [json.loads(line) for line in file]
        self.tokenizer = tokenizer
        self.prompts: dict[tuple, list[int]] = {}
        vocabulary = tokenizer.get_vocab()
        self.full_stops = {index for token, index in vocabulary.items() if token in (".", '."')}
        self.end = tokenizer.eos_token_id

    def prompt(self, question: str, has_picture: bool, image_tokens: int = 196) -> list[int]:
        """Tokenise a question as the processor would."""
        key = (question, has_picture, image_tokens)
        if key not in self.prompts:
            content = [{"type": "image"}] * has_picture + [{"type": "text", "text": question}]
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            text = text.replace("<image>", "<image>" * image_tokens)
            self.prompts[key] = self.tokenizer(text)["input_ids"]
        return self.prompts[key]

    def item(self, picture: int, chance: random.Random, brief_share: float = 0.1, cells: int = 196) -> dict:
        """Make one question and answer about a picture."""
        one = self.pictures[picture]
        if one["set"] == "openstax":
            detailed, last, brief = openstax_answers(one["row"])
        elif one["set"] == "caltech101":
            detailed, last, brief = class_answers(one["row"]["label"])
        else:
            detailed, last, brief = one["text"], "", ""
        short = one["set"] != "scenes" and chance.random() < brief_share
        question = chance.choice(BRIEF if short else DETAILED)
        if not short and chance.random() < 0.4:
            question += chance.choice(LONG)
        ending = [] if short else self.tokenizer(last)["input_ids"]
        tokens = self.tokenizer(brief if short else detailed)["input_ids"]
        answer = cut(tokens, self.full_stops, MAX_ANSWER - len(ending)) + ending
        prompt = self.prompt(question, True, cells)
        return {"picture": picture, "prompt": prompt, "answer": [*answer, self.end]}

    def text_item(self, picture: int, chance: random.Random) -> dict | None:
        """Make a question without a picture out of a textbook picture's caption."""
        row = self.pictures[picture]["row"]
        caption = tidy(row["caption"])
        if len(caption) < 120 or row["topic"] in ("Introduction", "Preface", ""):
            return None
        question = chance.choice(("Tell me about {}.", "Write about {}.", "What is {}?"))
        prompt = self.prompt(question.format(row["topic"].translate(PLAIN)), False)
        answer = cut(self.tokenizer(caption)["input_ids"], self.full_stops, MAX_ANSWER)
        return {"picture": None, "prompt": prompt, "answer": [*answer, self.end]}


def collate(items: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad items on the right.

    Returns: token ids [B, S] and labels [B, S] already moved one to the left (-100: no loss).
    """
    length = max(len(item["prompt"]) + len(item["answer"]) for item in items) - 1
    tokens = torch.zeros(len(items), length, dtype=torch.long)
    labels = torch.full((len(items), length), -100)
    for row, item in enumerate(items):
        whole = item["prompt"] + item["answer"]
        tokens[row, : len(whole) - 1] = torch.tensor(whole[:-1])
        start = len(item["prompt"]) - 1
        labels[row, start : start + len(item["answer"])] = torch.tensor(item["answer"])
    return tokens, labels
