"""Write model_cards/index.md from the cards. Example: python scripts/index.py"""

from __future__ import annotations

from moelora.cards import INDEX, index
from moelora.config import cards_folder

if __name__ == "__main__":
    (cards_folder() / INDEX).write_text(index(), encoding="utf-8")
