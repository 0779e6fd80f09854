import { defineConfig } from "vitest/config";

// Plain names: the files are committed, and a server sends them with "no-cache".
export default defineConfig({
  base: "/ui/assets/",
  esbuild: { jsx: "automatic", jsxImportSource: "preact" },
  build: {
    outDir: "../src/polymoe/server/ui",
    emptyOutDir: true,
    modulePreload: false,
    assetsDir: "",
    assetsInlineLimit: 0,
    target: "es2022",
    rollupOptions: { output: { entryFileNames: "app.js", assetFileNames: "app[extname]", inlineDynamicImports: true } },
  },
  server: { proxy: { "^/(v1|ui/(events|about|bundle))": "http://127.0.0.1:8000" } },
  test: { environment: "jsdom", include: ["src/**/*.test.ts", "src/**/*.test.tsx"] },
});
