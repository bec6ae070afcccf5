"""How results look: tables, figures, pages."""
