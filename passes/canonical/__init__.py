"""What re-tracing does by itself: the interpreter, and the operators that hide other operators."""
