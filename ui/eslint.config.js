import js from "@eslint/js";
import tseslint from "typescript-eslint";

export default tseslint.config(
  { ignores: ["node_modules", "write-hash.mjs"] },
  js.configs.recommended,
  ...tseslint.configs.strict,
  {
    rules: {
      "@typescript-eslint/no-non-null-assertion": "error",
      eqeqeq: "error",
      "no-restricted-properties": ["error", { property: "innerHTML", message: "Answers of a model are text." }],
    },
  },
);
