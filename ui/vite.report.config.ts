import { defineConfig } from "vite";

// One script and one style sheet, which `polymoe … --report` writes into its page.
export default defineConfig({
  esbuild: { jsx: "automatic", jsxImportSource: "preact" },
  define: { "process.env.NODE_ENV": '"production"' },
  build: {
    outDir: "../src/polymoe/server/ui",
    emptyOutDir: false,
    target: "es2022",
    cssCodeSplit: false,
    lib: { entry: "src/report.tsx", formats: ["iife"], name: "polymoeReport", fileName: () => "report.js" },
    rollupOptions: { output: { assetFileNames: "report[extname]" } },
  },
});
