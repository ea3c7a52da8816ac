"""What several tests share: backends right and wrong, small layers, made-up repositories, a browser."""
