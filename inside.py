"""Look inside an answer: what the output head reads after each H cycle, and how far each module call moves its state.

Everything comes from one forward pass with `output_hidden_states` over the question and its answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F


# Columns that a page can show; a longer answer is drawn up to here, and the title says so.
MOST_COLUMNS = 48


@dataclass(frozen=True)
class Inside:
    """What happened at each token of an answer.

    Attributes:
        answer: [tokens], ids of the answer.
        readings: [H_cycles, tokens], the id that the output head ranks first after each H cycle.
        probabilities: [H_cycles, tokens], the probability that the head then gives to the answer's token.
        calls: [module calls], their names in order: "L 1.1" is the first L call of the first H cycle.
        moves: [module calls, tokens], norm of the change of the state that the call updates, over that state's norm.
    """

    answer: torch.Tensor
    readings: torch.Tensor
    probabilities: torch.Tensor
    calls: list[str]
    moves: torch.Tensor


@torch.no_grad()
def look_inside(model: Any, sequence: torch.Tensor, prompt_length: int) -> Inside:
    """Reads one question with its answer.

    Args:
        model: an HRM-Text with an output head.
        sequence: [1, tokens], the question and its answer, as `generate` returns them.
        prompt_length: tokens of the question.

    Raises:
        ValueError: more than one row, or no token of an answer behind the prompt.
    """
    if sequence.dim() != 2 or sequence.shape[0] != 1:
        raise ValueError(f"`sequence` has shape {list(sequence.shape)}: give one row, [1, tokens]")
    if not 1 <= prompt_length < sequence.shape[1]:
        raise ValueError(
            f"`prompt_length` is {prompt_length} of {sequence.shape[1]} tokens: there is no answer to read"
        )
    config = model.config
    layers = config.num_layers_per_stack
    types = torch.zeros_like(sequence)
    types[:, :prompt_length] = 1
    # The first input and the end of each module call; all 129 states of the 1B would take 400 KB a token.
    wanted = list(range(0, config.num_hidden_layers + 1, layers))
    states = model(sequence, token_type_ids=types, output_hidden_states=wanted, use_cache=False).hidden_states

    # The state that predicts a token is the one at the position before it.
    where = slice(prompt_length - 1, -1)
    answer = sequence[0, prompt_length:]
    z_L = model.model.z_L_init.to(states[0]).expand_as(states[0])[0, where]
    z_H = states[0][0, where] - z_L
    readings, probabilities, calls, moves = [], [], [], []
    for h in range(config.H_cycles):
        for step in range(config.L_cycles + 1):
            index = (h * (config.L_cycles + 1) + step + 1) * layers
            # A stack ends with a norm; the recorded state is the one before it. The last is after it: twice is once.
            state = F.rms_norm(states[index], states[index].shape[-1:], eps=config.rms_norm_eps)[0, where]
            is_H = step == config.L_cycles
            before = z_H if is_H else z_L
            moves.append((state - before).float().norm(dim=-1) / before.float().norm(dim=-1))
            calls.append(f"H {h + 1}" if is_H else f"L {h + 1}.{step + 1}")
            z_H, z_L = (state, z_L) if is_H else (z_H, state)
        chances = model.lm_head(z_H).float().softmax(-1)
        readings.append(chances.argmax(-1))
        probabilities.append(chances.gather(1, answer[:, None])[:, 0])
    return Inside(answer, torch.stack(readings), torch.stack(probabilities), calls, torch.stack(moves))


def draw_inside(inside: Inside, tokenizer: Any, path: str | Path, title: str = "") -> None:
    """Draws two tables over the tokens of the answer: readings after each H cycle, and moves of each module call.

    Args:
        path: the file to write; its ending is the format (PNG, SVG, PDF).
        title: a line above, as the question.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: matplotlib does not know the format.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    total = len(inside.answer)
    shown = min(total, MOST_COLUMNS)
    readings, probabilities = (part[:, :shown].cpu().numpy() for part in (inside.readings, inside.probabilities))
    moves = inside.moves[:, :shown].cpu().numpy()
    answer = [_text(tokenizer, token) for token in inside.answer[:shown].tolist()]
    cycles, calls = len(readings), len(moves)
    figure, (top, bottom) = pyplot.subplots(
        2,
        1,
        figsize=(4.6 + 0.62 * shown, 2.2 + 0.42 * (cycles + calls)),
        height_ratios=(cycles, calls),
        layout="constrained",
    )
    panels = (
        (top, probabilities, "Blues", 1.0, [f"cycle {h + 1}" for h in range(cycles)]),
        (bottom, moves, "Oranges", float(moves.max()), inside.calls),
    )
    for axes, values, colors, most, rows in panels:
        picture = axes.imshow(values, aspect="auto", cmap=colors, vmin=0.0, vmax=most)
        axes.set(xticks=range(shown), xticklabels=answer, yticks=range(len(rows)), yticklabels=rows)
        axes.tick_params(length=0)
        figure.colorbar(picture, ax=axes, pad=0.01)
        for row in range(len(rows)):
            for column in range(shown):
                text = _text(tokenizer, int(readings[row, column])) if axes is top else f"{values[row, column]:.2f}"
                dark = values[row, column] > 0.6 * most
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    top.set_title("Read from z_H after each H cycle (shade: probability of the answer's token)", fontsize=9)
    bottom.set_title("How far each module call moves its state, over the state's norm", fontsize=9)
    bottom.set_xlabel("tokens of the answer" if shown == total else f"first {shown} of {total} tokens of the answer")
    # A dollar sign would begin a formula.
    figure.suptitle(title.replace("$", r"\$"), fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def require_matplotlib() -> None:
    """Raises an ImportError that says what to install."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the picture is drawn with matplotlib: pip install matplotlib") from error


def _text(tokenizer: Any, token: int) -> str:
    """A token as a reader sees it: spaces and line ends visible, special tokens by name, no formula."""
    text = tokenizer.decode([token]).replace(" ", "␣").replace("\n", "⏎").replace("$", r"\$")
    return {tokenizer.eos_token: "end"}.get(text, text if len(text) <= 9 else text[:8] + "…")
