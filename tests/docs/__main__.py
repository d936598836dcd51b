"""``make docs``: writes the pages that are made from the code."""

from tests.docs.recipe_page import write

if __name__ == "__main__":
    write()
