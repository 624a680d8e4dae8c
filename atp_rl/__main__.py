from atp_rl.cli import main

main()
