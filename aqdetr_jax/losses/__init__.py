"""Pure losses on arrays and masks: matching, set criterion, auxiliary queries, distillation."""
